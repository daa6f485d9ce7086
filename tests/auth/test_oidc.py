"""Other people's sign-in: what an OpenID Connect issuer's tokens open, and what is refused."""

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey, RSAKey

from issuers import OwnIssuer, RealIssuer, encoded, page
from people import share
from servers import Server, job
from tunesmith.auth import issuer_keys
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.oidc import ExternalIssuers
from tunesmith.auth.scopes import GENERATIVE_LANGUAGE, TUNING, TUNING_READONLY
from tunesmith.auth.service_accounts import ServiceAccounts
from tunesmith.auth.tokens import AccessTokens
from tunesmith.auth.verifiers import OwnTokens, Verifier
from tunesmith.caller import Caller, Credentials
from tunesmith.config import Issuer, Settings
from tunesmith.errors import InvalidArgument, Unauthenticated, Unavailable
from tunesmith.store.database import Database

ADA = "ada@example.com"
DISCOVERY = "/.well-known/openid-configuration"


class Site:
    """A Tunesmith that takes the tokens of one issuer."""

    def __init__(self, issuer: OwnIssuer, database: Database, **settings: Any) -> None:
        self.accounts = Accounts(database)
        given = {"url": issuer.url, "audiences": ["tunesmith"], "domains": ["example.com"], **settings}
        external = ExternalIssuers([Issuer(**given)], database)
        self._verifier = Verifier(ApiKeys(database), OwnTokens(AccessTokens(database)), external)

    def caller(self, token: str) -> Caller:
        return self._verifier.verify(Credentials(bearer=token, project="p"))

    def refuses(self, token: str) -> bool:
        try:
            self.caller(token)
        except Unauthenticated:
            return True
        return False


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def issuer() -> Iterator[OwnIssuer]:
    with OwnIssuer() as running:
        yield running


@pytest.fixture
def site(issuer: OwnIssuer, database: Database) -> Site:
    return Site(issuer, database)


@pytest.fixture
def again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuer_keys, "RETRY", 0.0)


# With a real issuer, and a real server.


@pytest.fixture(scope="module")
def real() -> Iterator[RealIssuer]:
    with RealIssuer() as running:
        yield running


@pytest.fixture(scope="module")
def served(real: RealIssuer, tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("company")
    config = folder / "tunesmith.toml"
    config.write_text(f"""
        [[issuers]]
        url = "{real.url}"
        audiences = ["tunesmith"]
        domains = ["example.com"]
        groups_claim = "groups"
        groups = {{ "/research" = "research@example.com" }}
    """)
    with Server(folder / "data", {**tiny, "TUNESMITH_CONFIG": str(config)}) as running:
        yield running


def person(**claims: Any) -> dict[str, Any]:
    return {"sub": "ada", "email": "Ada@Example.com", "email_verified": True, **claims}


def status(server: Server, token: str, path: str = "tunedModels") -> int:
    return server.http.get(f"/v1beta/{path}", headers={"authorization": f"Bearer {token}"}).status_code


def test_who_signs_in_at_the_issuer_is_in(real: RealIssuer, served: Server) -> None:
    token = real.sign_in(person())
    assert ADA not in served.run("accounts", "list")
    as_ada = {"authorization": f"Bearer {token}"}
    mine = served.call("POST", "tunedModels", job("hers", epochs=1), headers=as_ada)["metadata"]["tunedModel"]
    assert status(served, token, mine) == 200
    assert served.call("GET", f"{mine}/permissions", headers=as_ada)["permissions"][0]["emailAddress"] == ADA
    assert ADA in served.run("accounts", "list").split()
    served.run("accounts", "disable", ADA)
    assert status(served, token) == 401


def test_groups_come_with_the_token(real: RealIssuer, served: Server) -> None:
    mine = served.tune(job("for the team", epochs=1))["metadata"]["tunedModel"]
    share(served, mine, "READER", "research@example.com", "GROUP")
    eve, bob = ({"sub": name, "email": f"{name}@example.com", "email_verified": True} for name in ("eve", "bob"))
    inside = real.sign_in({**bob, "groups": ["/research", "/other"]})
    assert status(served, inside, mine) == 200
    listed = served.call("GET", "tunedModels", headers={"authorization": f"Bearer {inside}"})
    assert [model["name"] for model in listed["tunedModels"]] == [mine]
    outside = [
        real.sign_in({**eve, "groups": ["/other", "research"]}),
        real.sign_in(eve),
        real.sign_in({**bob, "groups": []}),  # he has left it
    ]
    assert [status(served, token, mine) for token in outside] == [403, 403, 403]
    assert status(served, real.sign_in({**eve, "groups": "research@example.com"}), mine) == 200


def test_who_does_not_belong_is_out(real: RealIssuer, served: Server) -> None:
    tokens = [
        real.sign_in(person(sub="eve", email="eve@example.com"), client="another-program"),
        real.sign_in(person(sub="eve", email="eve@example.com", email_verified=False)),
        real.sign_in({"sub": "eve", "email": "eve@example.com"}),
        real.sign_in(person(sub="eve", email="eve@elsewhere.example")),
        real.sign_in(person(sub="eve", email="admin@localhost")),
        real.sign_in({"sub": "eve"}),
    ]
    assert [status(served, token) for token in tokens] == [401] * len(tokens)
    assert "eve@elsewhere.example" not in served.run("accounts", "list")


# With one that can be made to misbehave.


def test_a_good_token(issuer: OwnIssuer, site: Site) -> None:
    caller = site.caller(issuer.sign())
    assert (caller.account, caller.scopes, caller.project) == (ADA, {TUNING, GENERATIVE_LANGUAGE}, "p")
    assert [account.email for account in site.accounts.list()] == [ADA]
    assert issuer.asked == [DISCOVERY, "/keys"]
    assert site.caller(issuer.sign(aud=["account", "tunesmith"], email_verified="true", nbf=time.time())) == caller
    assert issuer.asked == [DISCOVERY, "/keys"]  # the keys are kept


def no_signature(issuer: OwnIssuer) -> str:
    return f"{encoded({'alg': 'none', 'typ': 'JWT'})}.{encoded(issuer.claims())}."


def public_key_as_secret(issuer: OwnIssuer, form: str = "pem") -> str:
    secret = issuer.key.as_pem(private=False) if form == "pem" else issuer.key.as_der(private=False)
    signed = f"{encoded({'alg': 'HS256', 'kid': 'first'})}.{encoded(issuer.claims())}"
    return f"{signed}.{encoded(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def changed_after_signing(issuer: OwnIssuer) -> str:
    header, _, signature = issuer.sign().split(".")
    return f"{header}.{encoded(issuer.claims(email='admin@example.com'))}.{signature}"


def signature_of_another(issuer: OwnIssuer) -> str:
    return issuer.sign().rpartition(".")[0] + "." + issuer.sign(sub="2").rpartition(".")[2]


def by_hand(issuer: OwnIssuer, header: dict[str, Any]) -> str:
    return f"{encoded(header)}.{encoded(issuer.claims())}.{encoded(bytes(64))}"


def key_in_the_header(issuer: OwnIssuer, **more: Any) -> str:
    own = RSAKey.generate_key(2048)
    return issuer.sign(own, {"kid": "first", "jwk": own.as_dict(private=False), **more})


def deep(issuer: OwnIssuer) -> str:
    return f"{encoded({'alg': 'RS256', 'kid': 'first'})}.{encoded(b'[' * 90_000)}.{encoded(b'x')}"


ATTACKS: dict[str, Callable[[OwnIssuer], str]] = {
    "alg none": no_signature,
    "HS256 with the public key as PEM": public_key_as_secret,
    "HS256 with the public key as DER": lambda issuer: public_key_as_secret(issuer, "der"),
    "claims changed after signing": changed_after_signing,
    "the signature of another token": signature_of_another,
    "ES256 with an RSA key": lambda issuer: by_hand(issuer, {"alg": "ES256", "kid": "first"}),
    "a key of the attacker under a known kid": lambda issuer: issuer.sign(
        RSAKey.generate_key(2048), {"kid": "first"}
    ),
    "a key of the attacker in the header": key_in_the_header,
    "a key of the attacker at an address": lambda issuer: key_in_the_header(issuer, jku="http://127.0.0.1:9/keys"),
    "unknown kid": lambda issuer: issuer.sign(header={"kid": "../first"}),
    "a kid that is no text": lambda issuer: (
        f"{encoded({'alg': 'RS256', 'kid': {}})}.{encoded(issuer.claims())}.eA"
    ),
    "a header that must be understood": lambda issuer: issuer.sign(header={"crit": ["exp"], "exp": 1}),
    "a crit that is no list": lambda issuer: by_hand(issuer, {"alg": "RS256", "kid": "first", "crit": 5}),
    "an algorithm that is not pinned": lambda issuer: issuer.sign(header={"alg": "RS512"}),
    "another audience": lambda issuer: issuer.sign(aud="another"),
    "other audiences": lambda issuer: issuer.sign(aud=["another", {"tunesmith": 1}]),
    "no audience": lambda issuer: issuer.sign(aud=None, azp="tunesmith"),
    "another issuer": lambda issuer: issuer.sign(iss="https://accounts.example.com"),
    "an issuer that is almost ours": lambda issuer: issuer.sign(iss=f"{issuer.url}/"),
    "issuers": lambda issuer: issuer.sign(iss=[issuer.url]),
    "no issuer": lambda issuer: issuer.sign(iss=None),
    "expired": lambda issuer: issuer.sign(exp=time.time() - 61),
    "never expires": lambda issuer: issuer.sign(exp=None),
    "expires at no time": lambda issuer: issuer.sign(exp=float("nan")),
    "expires as text": lambda issuer: issuer.sign(exp="9999999999"),
    "issued in the future": lambda issuer: issuer.sign(iat=time.time() + 90),
    "not issued": lambda issuer: issuer.sign(iat=None),
    "not good before": lambda issuer: issuer.sign(nbf=time.time() + 90),
    "not good before no time": lambda issuer: issuer.sign(nbf=float("inf")),
    "a logout token": lambda issuer: issuer.sign(header={"typ": "logout+jwt"}),
    "a logout token of an older issuer": lambda issuer: issuer.sign(events={}),
    "an address that is not verified": lambda issuer: issuer.sign(email_verified=False),
    "an address of which nobody says that it is verified": lambda issuer: issuer.sign(email_verified=None),
    "an address elsewhere": lambda issuer: issuer.sign(email="ada@example.com.evil.example"),
    "an address with two parts": lambda issuer: issuer.sign(email="ada@evil.example@example.com"),
    "addresses": lambda issuer: issuer.sign(email=[ADA]),
    "no address": lambda issuer: issuer.sign(email=None),
    "claims that are no object": lambda issuer: f"{encoded({'alg': 'RS256'})}.{encoded([])}.{encoded(b'x')}",
    "claims that nest too deep": deep,
    "not base64": lambda issuer: "eyJ!.eyJ!.!",
    "not ASCII": lambda issuer: "eyJé.eyJ.x",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(issuer: OwnIssuer, site: Site, attack: str) -> None:
    assert site.refuses(ATTACKS[attack](issuer))
    assert site.accounts.list() == []
    assert site.caller(issuer.sign()).account == ADA  # and it was not the site that was broken


def test_a_token_of_another_issuers_key(issuer: OwnIssuer, database: Database) -> None:
    with OwnIssuer() as other:
        both = [
            Issuer(url=one.url, audiences=["tunesmith"], domains=[domain])
            for one, domain in ((issuer, "example.com"), (other, "other.example"))
        ]
        external = ExternalIssuers(both, database)
        assert external.verify(issuer.sign(), None)
        assert external.verify(other.sign(email="eve@other.example"), None)
        assert external.verify(other.sign(iss=issuer.url), None) is None
        assert external.verify(other.sign(), None) is None  # its own name and key, another's domain


def test_the_caller_decides_about_no_request(issuer: OwnIssuer, site: Site) -> None:
    """What names another issuer, or another way to sign, makes us ask nobody."""
    for token in (
        "opaque",
        no_signature(issuer),
        public_key_as_secret(issuer),
        issuer.sign(iss="https://evil.example"),
    ):
        assert site.refuses(token)
    assert issuer.asked == []


def test_what_can_be_set(issuer: OwnIssuer, database: Database) -> None:
    site = Site(issuer, database, algorithms=["PS256"], authorized_parties=["cli"], scopes=[TUNING_READONLY])
    assert site.caller(issuer.sign(header={"alg": "PS256"}, azp="cli")).scopes == {TUNING_READONLY}
    assert site.caller(issuer.sign(header={"alg": "PS256", "typ": "at+JWT"}, client_id="cli"))
    assert site.refuses(issuer.sign(header={"alg": "PS256"}, azp="web"))
    assert site.refuses(issuer.sign(azp="cli"))
    named = Site(issuer, database, account_claim="upn", verified_claim="")
    assert named.caller(issuer.sign(upn="Bob@example.com", email_verified=None)).account == "bob@example.com"


def test_an_issuer_that_makes_no_accounts(issuer: OwnIssuer, database: Database) -> None:
    site = Site(issuer, database, create_accounts=False, domains=["*"])
    assert site.refuses(issuer.sign())
    site.accounts.create(ADA)
    assert site.caller(issuer.sign()).account == ADA


def test_it_cannot_speak_for_a_service_account(issuer: OwnIssuer, site: Site, database: Database) -> None:
    ServiceAccounts(database).create("robot@example.com")
    assert site.refuses(issuer.sign(email="robot@example.com"))


def test_groups(issuer: OwnIssuer, database: Database) -> None:
    mapped = {"/research": "Research@example.com"}
    site = Site(issuer, database, groups_claim="groups", groups=mapped)
    claim = ["/research", "/unknown", "Team@Example.com", "team@evil.example", 7]
    assert site.caller(issuer.sign(groups=claim)).groups == {"research@example.com", "team@example.com"}
    assert site.caller(issuer.sign(groups="/research")).groups == {"research@example.com"}
    assert site.caller(issuer.sign()).groups == frozenset()
    assert Site(issuer, database).caller(issuer.sign(groups=claim)).groups == frozenset()


def test_elliptic_keys(issuer: OwnIssuer, site: Site) -> None:
    fits, too_large = (ECKey.generate_key(curve, {"kid": curve}) for curve in ("P-256", "P-384"))
    issuer.publish(issuer.key, fits, too_large)
    assert site.caller(issuer.sign(fits, {"alg": "ES256"}))
    assert site.refuses(issuer.sign(fits, {"alg": "ES256"})[:-4] + "AAAA")
    assert site.refuses(by_hand(issuer, {"alg": "ES256", "kid": "P-384"}))


def test_without_a_kid_the_key_is_the_only_one(issuer: OwnIssuer, site: Site, again_at_once: None) -> None:
    token = issuer.sign(header={"kid": None})
    assert site.caller(token)
    issuer.publish(issuer.key, RSAKey.generate_key(2048, {"kid": "second"}))
    site.refuses(issuer.sign(header={"kid": "makes it look again"}))
    assert site.refuses(token)


def test_keys_that_are_not_for_this(issuer: OwnIssuer, site: Site, again_at_once: None) -> None:
    public = issuer.key.as_dict(private=False)
    shared = {"kty": "oct", "kid": "first", "k": encoded(b"secret secret secret secret secret")}
    for wrong in (
        {**public, "use": "enc"},
        {**public, "alg": "PS256"},
        {**public, "n": encoded(b"\xff" * 128)},
        shared,
    ):
        issuer.publish(RSAKey.generate_key(2048, {"kid": "other"}), wrong)
        assert site.refuses(issuer.sign())
    issuer.publish({"kty": "RSA", "kid": "broken"}, {"kty": "OKP"}, "nonsense", public)
    assert site.caller(issuer.sign())


def test_a_new_key(issuer: OwnIssuer, site: Site, again_at_once: None) -> None:
    """Many who come with it at once make one request."""
    assert site.caller(issuer.sign())
    new = RSAKey.generate_key(2048, {"kid": "new"})
    issuer.publish(new)
    issuer.asked.clear()
    together = threading.Barrier(8)

    def come() -> str:
        together.wait()
        return site.caller(issuer.sign(new)).account

    with ThreadPoolExecutor(8) as pool:
        assert [future.result() for future in [pool.submit(come) for _ in range(8)]] == [ADA] * 8
    assert issuer.asked == [DISCOVERY, "/keys"]
    assert site.refuses(issuer.sign())  # the old one is gone


def test_unknown_kids_make_few_requests(issuer: OwnIssuer, site: Site) -> None:
    assert site.caller(issuer.sign())
    for number in range(20):
        assert site.refuses(issuer.sign(header={"kid": f"unknown {number}"}))
    assert issuer.asked == [DISCOVERY, "/keys"]


def test_old_keys_are_good_for_a_while(
    issuer: OwnIssuer, site: Site, again_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.caller(issuer.sign())
    issuer.answers["/keys"] = page({}, 500)
    monkeypatch.setattr(issuer_keys, "FRESH", 0.0)
    assert site.caller(issuer.sign())
    assert issuer.asked == [DISCOVERY, "/keys"] * 2
    monkeypatch.setattr(issuer_keys, "STALE", 0.0)
    with pytest.raises(Unavailable, match="cannot be reached"):
        site.caller(issuer.sign())
    monkeypatch.setattr(issuer_keys, "STALE", 60.0)
    issuer.publish(issuer.key)
    assert site.caller(issuer.sign())


def test_an_issuer_that_is_down(database: Database) -> None:
    with OwnIssuer() as issuer:
        token = issuer.sign()
    site = Site(issuer, database)
    for _ in range(3):
        with pytest.raises(Unavailable, match="cannot be reached"):
            site.caller(token)
    assert site.refuses("opaque")  # others are not kept waiting


def drip(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(b" ")
    except OSError:  # we hung up
        pass


KEYS = b'{"keys": []}'
BROKEN: dict[str, dict[str, Any]] = {
    "keys are not there": {"/keys": page({}, 404)},
    "keys never end": {"/keys": drip},
    "keys are packed": {"/keys": page(b"\x1f\x8b\x08", content_encoding="gzip")},
    "keys are no JSON": {"/keys": page(b"<html>")},
    "keys nest too deep": {"/keys": page(b"[" * 100_000)},
    "keys are a list": {"/keys": page([])},
    "there are no keys": {"/keys": page({"keys": []})},
    "keys are no list": {"/keys": page({"keys": 7})},
    "keys are elsewhere": {"/keys": page(b"", 302, location="/other"), "/other": page(KEYS)},
    "discovery is elsewhere": {DISCOVERY: page(b"", 302, location="/other"), "/other": page(KEYS)},
    "discovery names no keys": {DISCOVERY: page({})},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_issuer_that_misbehaves(issuer: OwnIssuer, site: Site, again_at_once: None, fault: str) -> None:
    good = dict(issuer.answers)
    issuer.answers.update(BROKEN[fault])
    with pytest.raises(Unavailable):
        site.caller(issuer.sign())
    assert "/other" not in issuer.asked
    issuer.answers.update(good)
    assert site.caller(issuer.sign()).account == ADA


@pytest.mark.parametrize("address", ["http://0.0.0.0:{port}/keys", "file:///etc/passwd", 7, None])
def test_keys_come_over_https(issuer: OwnIssuer, site: Site, address: object) -> None:
    if isinstance(address, str):
        address = address.format(port=issuer.url.rpartition(":")[2])
    issuer.answers[DISCOVERY] = page({"issuer": issuer.url, "jwks_uri": address})
    with pytest.raises(Unavailable):
        site.caller(issuer.sign())
    assert issuer.asked == [DISCOVERY]


def test_an_issuer_that_calls_itself_otherwise(issuer: OwnIssuer, site: Site) -> None:
    issuer.answers[DISCOVERY] = page({"issuer": f"{issuer.url}/", "jwks_uri": f"{issuer.url}/keys"})
    with pytest.raises(Unavailable):
        site.caller(issuer.sign())


def test_keys_that_are_huge(issuer: OwnIssuer, site: Site) -> None:
    issuer.publish(issuer.key, *([{"kty": "OKP", "kid": "x" * 100_000}] * 10))
    with pytest.raises(Unavailable):
        site.caller(issuer.sign())


def test_a_slow_issuer_is_given_up(issuer: OwnIssuer, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuer_keys, "LARGEST", 1 << 40)
    monkeypatch.setattr(issuer_keys, "DEADLINE", 0.2)
    issuer.answers["/keys"] = drip
    with pytest.raises(Unavailable):
        site.caller(issuer.sign())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"algorithms": ["none"]}, "algorithms"),
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": []}, "algorithms"),
        ({"url": "http://sso.example.com"}, "url"),
        ({"url": "https://sso.example.com?x=1"}, "url"),
        ({"url": "https://me@sso.example.com"}, "url"),
        ({"audiences": []}, "audiences"),
        ({"domains": []}, "domains"),
        ({"domains": ["*"]}, "domains: with \\*"),
        ({"audience": "x"}, "audience"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    given = {"url": "https://sso.example.com", "audiences": ["x"], "domains": ["example.com"], **settings}
    with pytest.raises(ValueError, match=f"issuers.*{reason}"):
        Settings.load(issuers=[given])


def test_settings_that_contradict_each_other(issuer: OwnIssuer, database: Database) -> None:
    one = {"url": "https://sso.example.com", "audiences": ["x"], "domains": ["example.com"]}
    with pytest.raises(ValueError, match="two have the same url"):
        Settings.load(issuers=[one, {**one, "audiences": ["y"]}])
    with pytest.raises(InvalidArgument, match="is not a scope"):
        Site(issuer, database, scopes=["everything"])
