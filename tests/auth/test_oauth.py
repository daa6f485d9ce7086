"""The authorization server over HTTP: what it gives, to whom, and every attack that it refuses."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from joserfc import jwt
from joserfc.jwk import KeySet
from sqlalchemy import update

from oauth_client import AUTH, LOOPBACK, TUTORIAL, Program, database_of
from servers import Server
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.clients import Clients
from tunesmith.auth.scopes import WORDS
from tunesmith.store.tables import AccessToken, AuthorizationCode

ADA = "ada@example.com"


@pytest.fixture
def programs(server: Server) -> Iterator[Callable[[str], Program]]:
    """Makes programs, each with a person who uses it."""
    made: list[Program] = []

    def make(email: str) -> Program:
        made.append(Program(server, email))
        return made[-1]

    yield make
    for program in made:
        program.http.close()


@pytest.fixture
def program(programs: Callable[[str], Program]) -> Program:
    return programs(ADA)


def test_a_code_gives_tokens_that_open_the_api(program: Program) -> None:
    page = program.asked()
    assert page.status == 303
    assert page.location.startswith(f"{LOOPBACK}?code=")
    assert page.told["state"] == "some state"
    given = program.redeem(page.told["code"])
    assert given["token_type"] == "Bearer"
    assert given["expires_in"] == 3600
    assert set(given["scope"].split()) == set(TUTORIAL.split())
    assert "id_token" not in given
    assert program.opens(given["access_token"])


def test_a_refresh_token_stays_as_it_is(program: Program) -> None:
    given = program.signed_in()
    for basic in (True, False):  # gcloud authenticates in both ways with one client
        new = program.refreshed(given["refresh_token"], basic=basic)  # type: ignore[arg-type]
        assert "refresh_token" not in new
        assert new["access_token"] != given["access_token"]
        assert program.opens(new["access_token"])
    assert program.opens(given["access_token"])


def test_a_code_that_comes_twice_ends_what_it_gave(program: Program) -> None:
    code = program.code()
    given = program.redeem(code)
    assert program.opens(given["access_token"])
    assert program.redeem(code, 400)["error"] == "invalid_grant"
    assert not program.opens(given["access_token"])
    assert program.refreshed(given["refresh_token"], 400)["error"] == "invalid_grant"


def test_a_code_that_comes_many_times_at_once(program: Program) -> None:
    code, gave = program.code(), []

    def redeem() -> None:
        form = {"code": code, "redirect_uri": LOOPBACK, "code_verifier": program.verifier}
        form["grant_type"] = "authorization_code"
        answer = program.http.post("/token", data=form, auth=(program.id, program.secret))
        gave.append(answer.json() if answer.status_code == 200 else None)

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (given,) = [one for one in gave if one]
    assert not program.opens(given["access_token"])


def test_a_code_without_its_verifier(program: Program) -> None:
    code = program.code()
    assert program.redeem(code, 400, code_verifier="x" * 43)["error"] == "invalid_grant"
    assert program.redeem(code, 400, code_verifier="")["error"] == "invalid_request"
    assert program.redeem(code, 400, code_verifier="short")["error"] == "invalid_request"
    assert program.redeem(code)["access_token"]  # who holds the verifier is not locked out by guesses


@pytest.mark.parametrize(
    "changed",
    [
        {"code_challenge": ""},
        {"code_challenge_method": "plain"},
        {"code_challenge_method": ""},
        {"code_challenge": "", "code_challenge_method": ""},
    ],
)
def test_pkce_is_required_with_s256(program: Program, changed: dict[str, str]) -> None:
    with program.browser() as browser:
        page = browser.open(program.address(**changed))
    assert page.location.startswith(LOOPBACK)
    assert page.told["error"] == "invalid_request"
    assert "S256" in page.told["error_description"]
    assert page.told["state"] == "some state"


@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example/",
        "http://evil.example/",
        "http://localhost.evil.example/",
        "http://localhost@evil.example/",
        "http://evil.example#http://localhost/",
        "http://localhost:8085@evil.example/",
        "http://127.0.0.1.evil.example/",
        "http://localhost\\@evil.example/",
        "http://localhost\r\nset-cookie: a=b",
        "http://localhost/ok\nset-cookie: a=b",
        "//evil.example/",
        "javascript:alert(1)",
        "data:text/html,x",
        "http://[::1]evil.example/",
        "https://localhost/",
        "http://localhost/#fragment",
        "http://lоcalhost/",  # a Cyrillic о
        "urn:ietf:wg:oauth:2.0:oob",
    ],
)
def test_redirects_stay_on_the_persons_machine(program: Program, address: str) -> None:
    with program.browser() as browser:
        page = browser.open(program.address(redirect_uri=address))
    assert page.status == 400
    assert page.location == ""
    assert "redirect_uri" in page.text


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/", "http://[::1]:50123/callback", "http://localhost"])
def test_redirects_to_any_loopback_port(program: Program, address: str) -> None:
    page = program.asked(redirect_uri=address)
    assert page.location.startswith(f"{address}?")
    assert program.redeem(page.told["code"], 400)["error"] == "invalid_grant"  # from another address
    assert program.redeem(page.told["code"], redirect_uri=address)["access_token"]


def test_a_program_that_listens_nowhere_is_told_by_pasting(program: Program) -> None:
    page = program.asked(redirect_uri="")
    assert page.status == 200
    assert page.line.startswith("https://localhost:8085/?code=4%2F")
    assert "&state=some+state" in page.line
    code = page.line.partition("code=")[2].partition("&")[0].replace("%2F", "/")
    assert program.redeem(code)["access_token"]  # gcloud says http://localhost:8085/ then
    page = program.asked("deny", redirect_uri="")
    assert "denied" in page.text
    assert page.line == ""


def test_a_code_belongs_to_its_client(program: Program, programs: Callable[[str], Program]) -> None:
    other = programs(ADA)
    other.verifier = program.verifier
    code = program.code()
    assert other.redeem(code, 400)["error"] == "invalid_grant"
    given = program.redeem(code)
    assert other.redeem(code, 400)["error"] == "invalid_grant"
    assert program.opens(given["access_token"])  # a stranger's replay ends nothing
    assert other.refreshed(given["refresh_token"], 400)["error"] == "invalid_grant"


def test_a_code_has_a_short_life(program: Program, server: Server) -> None:
    code = program.code()
    database = database_of(server)
    with database.write() as session:
        session.execute(update(AuthorizationCode).values(expire_time=time.time() - 1))
    database.close()
    assert program.redeem(code, 400)["error"] == "invalid_grant"


def test_deny(program: Program) -> None:
    page = program.asked("deny")
    assert page.told == {
        "error": "access_denied",
        "error_description": "The resource owner or authorization server denied the request",
        "state": "some state",
    }


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"scope": ""}, "invalid_scope"),
        ({"scope": "https://evil.example/scope"}, "invalid_scope"),
        ({"prompt": "none"}, "interaction_required"),
        ({"response_type": "token"}, "unsupported_response_type"),
    ],
)
def test_questions_that_are_answered_at_once(program: Program, changed: dict[str, str], error: str) -> None:
    with program.browser() as browser:
        assert browser.open(program.address(**changed)).told["error"] == error


def test_questions_that_lead_nowhere(program: Program) -> None:
    addresses = [
        program.address(client_id="nobody"),
        program.address(client_id=""),
        program.address(response_type=""),
        program.address(response_type='"\u00e9\n'),
        f"{program.address()}&scope=openid",
        f"{program.address()}&state=%ff",
        "/o/oauth2/auth",
    ]
    with program.browser() as browser:
        for address in addresses:
            page = browser.open(address)
            assert (page.status, page.location) == (400, ""), address
            assert "Nothing was given" in page.text or "did not work" in page.text


def test_consent_is_asked_each_time(program: Program) -> None:
    with program.browser() as browser:
        browser.allow(program.address(), ADA, "correct horse")
        for prompt in ("", "consent"):
            page = browser.open(program.address(prompt=prompt))
            assert "wants to use your account" in page.text
            assert ADA in page.text
            assert "Everything you may do here" in page.text
            assert WORDS[f"{AUTH}generative-language.tuning"] in page.text


def test_scopes_of_a_refresh(program: Program) -> None:
    refresh_token = program.signed_in(scope=TUTORIAL)["refresh_token"]
    narrow = f"{AUTH}generative-language.tuning"
    assert program.refreshed(refresh_token, scope=narrow)["scope"] == narrow
    # `print-access-token --scopes` asks for these two on top.
    identity = f"{narrow} openid {AUTH}userinfo.email"
    assert program.refreshed(refresh_token, scope=identity)["id_token"]
    more = f"{narrow} {AUTH}generative-language"
    assert program.refreshed(refresh_token, 400, scope=more)["error"] == "invalid_scope"


def test_a_revoked_refresh_token_ends_its_access_tokens(program: Program) -> None:
    given = program.signed_in()
    new = program.refreshed(given["refresh_token"])
    program.post("/revoke", token=given["refresh_token"])
    assert not program.opens(given["access_token"])
    assert not program.opens(new["access_token"])
    assert program.refreshed(given["refresh_token"], 400)["error"] == "invalid_grant"


def test_revoking_as_googles_clients_do(program: Program) -> None:
    given = program.signed_in()
    # The token in the query, no body, no client; an access token ends the refresh token, too.
    assert program.http.post("/revoke", params={"token": given["access_token"]}).status_code == 200
    assert not program.opens(given["access_token"])
    assert program.refreshed(given["refresh_token"], 400)["error"] == "invalid_grant"
    assert program.http.post("/revoke", params={"token": "unknown"}).status_code == 200
    assert program.http.post("/revoke").status_code == 400


def test_revoking_anothers_token(program: Program, programs: Callable[[str], Program]) -> None:
    given, other = program.signed_in(), programs(ADA)
    other.post("/revoke", token=given["refresh_token"])
    assert program.opens(given["access_token"])
    wrong = {"token": given["refresh_token"], "client_id": program.id, "client_secret": "wrong"}
    assert program.http.post("/revoke", data=wrong).status_code == 401
    assert program.opens(given["access_token"])


def test_a_disabled_account_and_a_revoked_client(
    program: Program, programs: Callable[[str], Program], server: Server
) -> None:
    bob = programs("bob@example.com")
    given, code = bob.signed_in(), bob.code()
    database = database_of(server)
    Accounts(database).disable("bob@example.com")
    assert bob.redeem(code, 400)["error"] == "invalid_grant"
    assert bob.refreshed(given["refresh_token"], 400)["error"] == "invalid_grant"
    assert not bob.opens(given["access_token"])
    given = program.signed_in()
    Clients(database).revoke(program.id)
    database.close()
    assert program.refreshed(given["refresh_token"], 401)["error"] == "invalid_client"
    assert not program.opens(given["access_token"])


def test_a_new_password_ends_sign_ins(programs: Callable[[str], Program], server: Server) -> None:
    carol = programs("carol@example.com")
    given = carol.signed_in()
    server.run("accounts", "password", carol.email, "--password-stdin", input="battery staple\n")
    assert not carol.opens(given["access_token"])
    with carol.browser() as browser:
        assert browser.sign_in(browser.open("/signin"), carol.email, "correct horse").status == 403
        assert carol.email in browser.sign_in(browser.open("/signin"), carol.email, "battery staple").text


@pytest.mark.parametrize(
    "authorization",
    ["Basic", "Basic !!!", "Basic /w==", "Basic bm9jb2xvbg==", "Basic Og==", "Bearer x", "Basic bm9ib2R5OngK"],
)
def test_who_is_no_client(program: Program, authorization: str) -> None:
    form = {"grant_type": "refresh_token", "refresh_token": program.signed_in()["refresh_token"]}
    answer = program.http.post("/token", data=form, headers={"authorization": authorization})
    assert answer.status_code == 401, answer.text
    assert answer.json()["error"] == "invalid_client"
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert answer.headers["cache-control"] == "no-store"


def test_requests_that_are_none(program: Program) -> None:
    def refused(**options: Any) -> str:
        answer = program.http.post("/token", auth=(program.id, program.secret), **options)
        assert answer.status_code == 400, answer.text
        error: str = answer.json()["error"]
        return error

    assert refused(data={}) == "unsupported_grant_type"
    assert refused(data={"grant_type": "password\r\nx: y"}) == "unsupported_grant_type"
    assert refused(json={"grant_type": "refresh_token"}) == "invalid_request"
    assert refused(data={"grant_type": "refresh_token"}) == "invalid_request"
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert refused(content=b"grant_type=refresh_token&grant_type=refresh_token", headers=form) == "invalid_request"
    assert refused(content=b"\xff", headers=form) == "invalid_request"
    assert refused(content=b"a=b&" * 1000, headers=form) == "invalid_request"
    assert refused(content=b"a=" + b"b" * (1 << 17), headers=form) == "invalid_request"
    assert program.http.get("/token").status_code == 405


def test_introspection(program: Program, programs: Callable[[str], Program]) -> None:
    given, other = program.signed_in(), programs(ADA)
    about = program.post("/introspect", token=given["access_token"])
    assert about["active"] is True
    assert about["username"] == ADA
    assert about["client_id"] == program.id
    assert set(about["scope"].split()) == set(TUTORIAL.split())
    assert about["exp"] - about["iat"] == 3600
    assert program.post("/introspect", token=given["refresh_token"])["active"] is True
    assert other.post("/introspect", token=given["access_token"]) == {"active": False}
    assert program.post("/introspect", token="unknown") == {"active": False}
    assert program.http.post("/introspect", data={"token": given["access_token"]}).status_code == 401


def test_tokeninfo_and_userinfo(program: Program) -> None:
    token = program.signed_in()["access_token"]
    about = program.http.get("/tokeninfo", params={"access_token": token}).json()
    assert (about["email"], about["aud"]) == (ADA, program.id)
    assert 3500 < int(about["expires_in"]) <= 3600
    assert program.http.get("/tokeninfo", params={"access_token": "x"}).status_code == 400
    user = program.http.get("/userinfo", headers={"authorization": f"Bearer {token}"}).json()
    assert user == {"sub": ADA, "email": ADA, "email_verified": True}
    assert program.http.get("/userinfo").status_code == 401


def test_metadata_names_what_is_there(program: Program, server: Server) -> None:
    metadata = program.http.get("/.well-known/oauth-authorization-server").json()
    AuthorizationServerMetadata(metadata).validate()
    assert metadata["issuer"] == server.url
    assert metadata["code_challenge_methods_supported"] == ["S256"]
    assert program.http.get("/.well-known/openid-configuration").json() == metadata
    for name, address in metadata.items():
        if name.endswith(("_endpoint", "_uri")):
            assert program.http.get(address).status_code != 404, name


def test_identity_tokens_and_the_rotation_of_their_keys(program: Program, server: Server) -> None:
    def keys() -> KeySet:
        return KeySet.import_key_set(program.http.get("/oauth2/v3/certs").json())

    asked = {"scope": f"openid {AUTH}userinfo.email {AUTH}cloud-platform", "nonce": "n-1"}
    first = program.signed_in(**asked)["id_token"]
    claims = jwt.decode(first, keys(), ["RS256"]).claims
    assert claims["iss"] == server.url
    assert (claims["aud"], claims["email"], claims["nonce"]) == (program.id, ADA, "n-1")
    assert claims["exp"] - claims["iat"] == 3600
    server.run("keys", "rotate")
    second = program.signed_in(**asked)["id_token"]
    kids = [json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "==="))["kid"] for token in (first, second)]
    assert kids[0] != kids[1]
    assert {"d", "p", "q"}.isdisjoint(program.http.get("/oauth2/v3/certs").json()["keys"][0])
    for token in (first, second):  # who was signed with the old key is still believed
        assert jwt.decode(token, keys(), ["RS256"]).claims["email"] == ADA


def test_no_secret_is_stored(program: Program, server: Server) -> None:
    code = program.code()
    given = program.redeem(code)
    stored = b"".join(file.read_bytes() for file in server.data_dir.glob("tunesmith.db*"))
    assert ADA.encode() in stored
    for secret in (code, given["access_token"], given["refresh_token"], program.secret, "correct horse"):
        assert secret.encode() not in stored


def test_an_expired_token_opens_nothing(program: Program, server: Server) -> None:
    given = program.signed_in()
    database = database_of(server)
    with database.write() as session:
        session.execute(update(AccessToken).values(expire_time=time.time() - 1))
    database.close()
    assert not program.opens(given["access_token"])
    assert program.post("/introspect", token=given["access_token"]) == {"active": False}
    assert program.opens(program.refreshed(given["refresh_token"])["access_token"])
