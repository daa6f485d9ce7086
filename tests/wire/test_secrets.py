"""What proves who somebody is, and what models are tuned on, stays out of logs and out of the database."""

from pathlib import Path

import grpc
import pytest

from oauth_client import PASSWORD, Program
from people import Person
from servers import Server, job
from tunesmith import protos

V1BETA = "google.ai.generativelanguage.v1beta"
TOLD = "what nobody else is to know"
ASKED = "what is only asked"


def call_over_grpc(server: Server, *metadata: tuple[str, str]) -> grpc.StatusCode:
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/{V1BETA}.ModelService/ListTunedModels",
            request_serializer=lambda message: message.SerializeToString(),
        )
        try:
            call(protos.ListTunedModelsRequest(), metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def sign_in(server: Server) -> dict[str, str]:
    """Sign in and out in all the ways that there are, rightly and wrongly; return all secrets that went by."""
    ada = Program(server, "ada@example.com")
    with ada.browser() as browser:
        assert browser.sign_in(browser.open(ada.address()), ada.email, "wrong horse").status == 403
    with ada.browser() as browser:
        code = browser.allow(ada.address(), ada.email, PASSWORD, "allow").told["code"]
        cookies = {f"cookie {number}": one.value or "" for number, one in enumerate(browser.http.cookies.jar)}
    given = ada.redeem(code)
    ada.redeem(code, 400)
    ada.redeem("4/not-a-code-at-all", 400)
    again = ada.refreshed(given := ada.signed_in()["refresh_token"])["access_token"]
    ada.refreshed("1//not-a-refresh-token", 400)
    other = Program(server, "ada@example.com")
    other.refreshed(given, 400)
    ada.post("/introspect", token=again)
    assert ada.opens(again)
    ada.http.get("/tokeninfo", params={"access_token": again})
    ada.post("/revoke", token=again)
    assert not ada.opens(again)
    ada.http.close()
    other.http.close()
    return {
        "password": PASSWORD,
        "wrong password": "wrong horse",
        "code": code,
        "wrong code": "4/not-a-code-at-all",
        "refresh token": given,
        "wrong refresh token": "1//not-a-refresh-token",
        "access token": again,
        "client secret": ada.secret,
        "verifier": ada.verifier,
        **cookies,
    }


def call(server: Server) -> dict[str, str]:
    """Call with tokens and keys wherever they may be, good and bad; return them."""
    token = server.run("token", "admin@localhost").strip()
    key = Person(server, "bob@example.com").headers["x-goog-api-key"]
    wrong = {"bearer": "tst.no-such-token", "key": "tsk_no-such-key"}
    bare = {"authorization": ""}
    http = server.http
    assert http.get("/v1beta/tunedModels", headers={"authorization": f"Bearer {token}"}).status_code == 200
    assert http.get("/v1beta/tunedModels", params={"access_token": token}, headers=bare).status_code == 200
    assert http.get("/v1beta/tunedModels", params={"key": key}, headers=bare).status_code == 200
    assert http.get("/v1beta/tunedModels", headers={**bare, "x-goog-api-key": key}).status_code == 200
    assert http.get("/v1beta/tunedModels", params={"key": wrong["key"]}, headers=bare).status_code == 400
    bad = {"authorization": f"Bearer {wrong['bearer']}"}
    assert http.get("/v1beta/tunedModels", headers=bad).status_code == 401
    assert http.get("/nowhere", params={"key": key}).status_code == 404
    assert http.get("/v1beta/tunedModels", params={"key": key, "alt": "media"}, headers=bare).status_code == 400
    query, broken = {"access_token": token}, b'{"display_name":'
    assert http.post("/v1beta/tunedModels", params=query, content=broken, headers=bare).status_code == 400
    assert call_over_grpc(server, ("authorization", f"Bearer {token}")) == grpc.StatusCode.OK
    assert call_over_grpc(server, ("x-goog-api-key", key)) == grpc.StatusCode.OK
    assert call_over_grpc(server, ("authorization", bad["authorization"])) == grpc.StatusCode.UNAUTHENTICATED
    return {"own token": token, "API key": key, "wrong token": wrong["bearer"], "wrong key": wrong["key"]}


def tune_and_ask(server: Server) -> None:
    body = job(name="private", description=TOLD)
    examples = body["tuning_task"]["training_data"]["examples"]["examples"]
    body["tuning_task"]["training_data"]["examples"]["examples"] = [
        *examples,
        {"text_input": TOLD, "output": TOLD},
    ]
    name = server.finished(server.tune(body))["name"].partition("/operations")[0]
    prompt = {"contents": [{"parts": [{"text": ASKED}]}]}
    server.call("POST", f"{name}:generateContent", prompt)
    server.call("POST", f"{name}:generateContent", {**prompt, "nonsense": ASKED}, 400)


@pytest.fixture(scope="module")
def secrets(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Server]:
    """All secrets that went through a server that says all it can, and the server, which has ended."""
    with Server(tmp_path_factory.mktemp("data"), tiny, "--log-level", "debug") as server:
        found = {**sign_in(server), **call(server)}
        tune_and_ask(server)
    return found, server


def test_no_secret_is_in_the_log(secrets: tuple[dict[str, str], Server]) -> None:
    found, server = secrets
    log = Path(server.log.name).read_text()
    assert " D " in log  # it did say all it could
    assert all(len(secret) > 8 for secret in found.values())
    assert [name for name, secret in found.items() if secret in log] == []
    assert TOLD not in log
    assert ASKED not in log


def test_no_secret_is_in_the_database_as_it_is(secrets: tuple[dict[str, str], Server]) -> None:
    found, server = secrets
    held = b"".join(path.read_bytes() for path in server.data_dir.glob("tunesmith.db*"))
    assert b"ada@example.com" in held
    assert [name for name, secret in found.items() if secret.encode() in held] == []
    assert ASKED.encode() not in held


def test_no_secret_is_in_the_audit_record(secrets: tuple[dict[str, str], Server]) -> None:
    found, server = secrets
    record = server.run("audit", "--json", "--limit", "0")
    assert "CreateTunedModel" in record
    assert [name for name, secret in found.items() if secret in record] == []
    assert TOLD not in record
