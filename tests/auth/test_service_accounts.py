"""What service accounts sign: as an assertion for a token, and as the bearer token itself; and every forgery."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from oauth_client import AUTH, Program, database_of
from servers import Server
from tunesmith.auth.service_accounts import ServiceAccounts

ROBOT = "robot@example.com"
GOOGLE = "https://oauth2.googleapis.com/token"
TUNING = f"{AUTH}generative-language.tuning"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"


class Robot:
    """A service account and its key file."""

    def __init__(self, server: Server, file: Path, email: str = ROBOT) -> None:
        server.run("service-account", "create", email, "--url", server.url, "-o", str(file))
        self.file: dict[str, str] = json.loads(file.read_text())
        self.key = RSAKey.import_key(self.file["private_key"])

    def claims(self, **changed: Any) -> dict[str, Any]:
        """What google-auth signs; a None is left out."""
        now = int(time.time())
        claims = {"iss": ROBOT, "aud": GOOGLE, "iat": now, "exp": now + 3600, "scope": TUNING, **changed}
        return {name: value for name, value in claims.items() if value is not None}

    def signed(self, header: dict[str, Any] | None = None, key: RSAKey | None = None, **changed: Any) -> str:
        head = {"alg": "RS256", "kid": self.file["private_key_id"], **(header or {})}
        return jwt.encode(head, self.claims(**changed), key or self.key, [head["alg"]])


@pytest.fixture(scope="module")
def robot(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Robot:
    return Robot(server, tmp_path_factory.mktemp("keys") / "robot.json")


@pytest.fixture
def program(server: Server) -> Iterator[Program]:
    program = Program(server, "ada@example.com")
    yield program
    program.http.close()


@pytest.fixture
def exchange(program: Program) -> Callable[[str], tuple[int, dict[str, Any]]]:
    """Asks for a token with an assertion; returns status and answer."""

    def exchange(assertion: str) -> tuple[int, dict[str, Any]]:
        answer = program.http.post("/token", data={"grant_type": JWT_BEARER, "assertion": assertion})
        return answer.status_code, answer.json()

    return exchange


Exchange = Callable[[str], tuple[int, dict[str, Any]]]


def test_an_assertion_gives_a_token(server: Server, robot: Robot, exchange: Exchange, program: Program) -> None:
    for audience in (GOOGLE, f"{server.url}/token", server.url, [server.url, "https://other.example"]):
        status, given = exchange(robot.signed(aud=audience))
        assert status == 200
        assert "refresh_token" not in given
        assert program.opens(given["access_token"])
    about = program.http.get("/tokeninfo", params={"access_token": given["access_token"]}).json()
    assert (about["email"], about["scope"]) == (ROBOT, TUNING)
    # The assertion itself is for the token endpoint, and opens nothing else.
    assert not program.opens(robot.signed())


def test_a_self_signed_token_opens_the_api(robot: Robot, exchange: Exchange, program: Program) -> None:
    token = robot.signed(sub=ROBOT, aud=None)
    assert program.opens(token)
    assert program.opens(robot.signed(aud="https://generativelanguage.googleapis.com/", scope=None))
    assert not program.opens(robot.signed(aud=None, scope=None))
    assert not program.opens(robot.signed(aud="https://other.example/"))
    assert not program.opens(robot.signed(aud=None, exp=int(time.time()) - 120))
    assert not program.opens(token[:-4] + "AAAA")
    assert exchange(token)[0] == 400  # nor does it give a token: it is for nobody


def test_an_identity_token(robot: Robot, exchange: Exchange) -> None:
    status, given = exchange(robot.signed(scope=None, target_audience="https://other.example"))
    assert status == 200
    assert given.keys() == {"id_token"}
    assert exchange(robot.signed(scope=None))[1]["error"] == "invalid_scope"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"aud": "https://other.example/token"}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"aud": ["https://other.example", 7]}, "another audience"),
        ({"iss": "ada@example.com"}, "not of its iss"),
        ({"iss": None}, "not of its iss"),
        ({"sub": "ada@example.com"}, "another account"),
        ({"exp": None}, "iat and exp"),
        ({"iat": None}, "iat and exp"),
        ({"exp": "soon"}, "iat and exp"),
        ({"exp": True}, "iat and exp"),
        ({"exp": 10**400}, "iat and exp"),
        ({"exp": float("nan")}, "iat and exp"),
    ],
)
def test_claims_that_are_refused(robot: Robot, exchange: Exchange, changed: dict[str, Any], why: str) -> None:
    status, answer = exchange(robot.signed(**changed))
    assert (status, answer["error"]) == (400, "invalid_grant")
    assert why in answer["error_description"]


@pytest.mark.parametrize(
    ("issued", "lasts", "why"),
    [
        (-3700, 3600, "expired"),
        (300, 3600, "future"),
        (0, 7200, "more than an hour"),
        (-7200, 10_000, "more than an hour"),
    ],
)
def test_times_that_are_refused(robot: Robot, exchange: Exchange, issued: int, lasts: int, why: str) -> None:
    begin = int(time.time()) + issued
    status, answer = exchange(robot.signed(iat=begin, exp=begin + lasts))
    assert (status, answer["error"]) == (400, "invalid_grant")
    assert why in answer["error_description"]
    assert "future" in exchange(robot.signed(nbf=int(time.time()) + 300))[1]["error_description"]


def forged(header: dict[str, Any], claims: dict[str, Any], key: bytes | None) -> str:
    """A JWT that no library would make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signature = hmac.digest(key, b".".join(parts), hashlib.sha256) if key is not None else b""
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def test_forgeries(robot: Robot, exchange: Exchange, program: Program) -> None:
    kid = robot.file["private_key_id"]
    public = robot.key.as_pem(private=False)
    mine = RSAKey.generate_key(2048)
    embedded = {"alg": "RS256", "kid": "mine", "jwk": mine.as_dict(private=False)}
    claims = robot.claims(sub=ROBOT, aud=None)
    tokens = [
        forged({"alg": "none", "kid": kid}, robot.claims(), None),
        forged({"alg": "None", "kid": kid}, claims, None),
        forged({"alg": "none", "kid": kid}, claims, b""),
        forged({"alg": "HS256", "kid": kid}, robot.claims(), public),  # the public key as if it were a shared one
        forged({"alg": "HS256", "kid": kid}, claims, public.strip()),
        forged({"alg": "RS256", "kid": kid}, claims, public),
        forged({"alg": "RS256", "kid": ["x"]}, claims, public),
        forged({"alg": "RS256", "kid": "' OR 1=1 --"}, claims, public),
        robot.signed(key=mine),
        robot.signed(key=mine, sub=ROBOT, aud=None),
        jwt.encode(embedded, claims, mine, ["RS256"]),
        robot.signed({"kid": "unknown"}),
        robot.signed({"alg": "PS256"}),
        robot.signed({"alg": "RS512"}),
        forged({"alg": "RS256", "kid": kid, "crit": ["x"]}, claims, public),
        forged({"alg": "RS256", "kid": kid, "crit": 5}, claims, public),
        robot.signed() + ".x",
        "eyJ.eyJ.",
        "x",
        "eyJ" + "A" * 60_000,
    ]
    for token in tokens:
        status, answer = exchange(token)
        assert (status, answer["error"]) == (400, "invalid_grant"), token
        assert not program.opens(token[:8000]), token


def test_a_key_of_another_service_account(
    server: Server, robot: Robot, exchange: Exchange, tmp_path: Path
) -> None:
    other = Robot(server, tmp_path / "other.json", "other@example.com")
    assert "not of its iss" in exchange(other.signed())[1]["error_description"]


def test_deleting_ends_keys_and_tokens(
    server: Server, exchange: Exchange, program: Program, tmp_path: Path
) -> None:
    temp = Robot(server, tmp_path / "temp.json", "temp@example.com")
    _, given = exchange(temp.signed(iss="temp@example.com"))
    second = Robot(server, tmp_path / "second.json", "temp@example.com")
    assert second.file["private_key_id"] != temp.file["private_key_id"]
    server.run("service-account", "delete", "temp@example.com")
    assert not program.opens(given["access_token"])
    for robot in (temp, second):
        assert exchange(robot.signed(iss="temp@example.com"))[0] == 400
    gone = server.run("service-account", "create", "temp@example.com", "--url", server.url, code=1)
    assert "was deleted" in gone
    assert "no service account" in server.run("service-account", "delete", "temp@example.com", code=1)


def test_people_are_no_service_accounts(server: Server, program: Program) -> None:
    said = server.run("service-account", "create", program.email, "--url", server.url, code=1)
    assert "a person's account" in said
    said = server.run("accounts", "password", ROBOT, "--password-stdin", code=1, input="a password\n")
    assert "is a service account" in said


def test_only_the_public_half_is_stored(server: Server, robot: Robot) -> None:
    database = database_of(server)
    held = {account.email: keys for account, keys in ServiceAccounts(database).list()}
    database.close()
    assert "PUBLIC KEY" in held[ROBOT][0].public_key
    stored = b"".join(file.read_bytes() for file in server.data_dir.glob("tunesmith.db*"))
    assert robot.file["private_key"].splitlines()[5].encode() not in stored
