"""A certificate authority of one's own, for trying out TLS where there is no public certificate."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397  # what browsers take at most
_SKEW = timedelta(hours=1)  # clients' clocks may be behind


@dataclass(frozen=True)
class Issued:
    """Where the files are.

    Attributes:
        authority: The authority's certificate, which clients are told to trust.
        certificate: The server's certificate, with the authority's behind it.
        key: The server's private key.
        expires: When the server's certificate ends.
    """

    authority: Path
    certificate: Path
    key: Path
    expires: datetime


def issue(folder: Path, names: Sequence[str]) -> Issued:
    """Make a server certificate, and first the authority when the folder has none.

    The authority stays from one time to the next, so that clients trust it once.

    Args:
        folder: Where all files are written; private keys can be read by their owner only.
        names: Host names and IP addresses that the certificate is good for.

    Raises:
        ValueError: A name is neither, or the authority in the folder cannot be used.
        OSError: The files cannot be read or written.
    """
    subjects = [_general_name(name) for name in names]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority, authority_key = _authority(folder / "ca.pem", folder / "ca.key")
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(names[0]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(min(now + timedelta(days=CERTIFICATE_DAYS), authority.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_authority_key_identifier(authority), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    issued = Issued(
        folder / "ca.pem", folder / "server.pem", folder / "server.key", certificate.not_valid_after_utc
    )
    _write(issued.key, _private(key), 0o600)
    _write(issued.certificate, _public(certificate) + _public(authority), 0o644)
    return issued


def _authority(file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the authority of the folder, or a new one."""
    if not key_file.exists():
        authority, key = _new_authority()
        _write(key_file, _private(key), 0o600)
        _write(file, _public(authority), 0o644)
        return authority, key
    authority = x509.load_pem_x509_certificate(file.read_bytes())
    loaded = serialization.load_pem_private_key(key_file.read_bytes(), None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != authority.public_key():
        raise ValueError(f"{key_file} is not the key of {file}: move both away, and new ones are made")
    if authority.not_valid_after_utc < datetime.now(UTC):
        raise ValueError(f"{file} has expired: move it and {key_file.name} away, and new ones are made")
    return authority, loaded


def _new_authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = _name("Tunesmith local authority")
    signs = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _authority_key_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise ValueError(f"{name!r} is neither a host name nor an IP address") from None


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, data: bytes, mode: int) -> None:
    """Write a file at once, with its mode from the beginning: nobody ever reads half of it, or a key too many."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)
