"""`tunesmith certificate`, and that nothing is served in the open by mistake."""

import stat
from pathlib import Path

import pytest
from cryptography import x509

from servers import Server
from tunesmith.certificates import CERTIFICATE_DAYS, issue


def test_the_authority_stays(tmp_path: Path) -> None:
    first = issue(tmp_path / "tls", ["localhost", "::1"])
    authority, certificate = first.authority.read_bytes(), first.certificate.read_bytes()
    second = issue(tmp_path / "tls", ["tuning.example", "10.1.2.3"])
    assert second.authority.read_bytes() == authority
    assert second.certificate.read_bytes() != certificate
    leaf, ca = x509.load_pem_x509_certificates(second.certificate.read_bytes())
    leaf.verify_directly_issued_by(ca)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["tuning.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days <= CERTIFICATE_DAYS


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    made = issue(tmp_path / "tls", ["localhost"])
    for file in (made.key, tmp_path / "tls" / "ca.key"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700


def test_an_authority_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    made = issue(tmp_path / "tls", ["localhost"])
    other = issue(tmp_path / "other", ["localhost"])
    made.authority.write_bytes(other.authority.read_bytes())
    with pytest.raises(ValueError, match=r"ca\.key is not the key of .*ca\.pem: move both away"):
        issue(tmp_path / "tls", ["localhost"])


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bücher' is neither a host name nor an IP address"):
        issue(tmp_path / "tls", ["bücher"])
    assert not (tmp_path / "tls").exists()


def test_the_command_says_how_clients_trust_it(tiny: dict[str, str], data_dir: Path) -> None:
    said = Server(data_dir, tiny).run("certificate", "tuning.example")
    for needed in (
        "--ssl-certfile",
        "--cacert",
        "custom_ca_certs_file",
        "REQUESTS_CA_BUNDLE",
        "NODE_EXTRA_CA_CERTS",
    ):
        assert needed in said
    assert str(data_dir / "tls" / "ca.pem") in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_other_machines_are_served_over_tls_or_on_demand(tiny: dict[str, str], data_dir: Path, host: str) -> None:
    said = Server(data_dir, tiny).run("serve", "--host", host, "--port", "0", "--grpc-port", "0", code=1)
    assert "--ssl-certfile" in said
    assert "--insecure" in said
    assert not data_dir.exists()


def test_insecure_on_demand(tiny: dict[str, str], data_dir: Path) -> None:
    with Server(data_dir, tiny, "--host", "0.0.0.0", "--insecure", "--workers", "0") as server:
        assert server.http.get("/healthz").status_code == 200
