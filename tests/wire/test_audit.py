"""What a live server and the commands leave in the audit record."""

import json
from typing import Any

import grpc
import pytest

from people import Person, share
from servers import Server, job
from tunesmith import protos

V1BETA = "google.ai.generativelanguage.v1beta"


def recorded(server: Server, *options: str) -> list[dict[str, Any]]:
    lines = server.run("audit", "--json", "--limit", "0", *options).splitlines()
    return [json.loads(line) for line in lines]


def told(records: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(one["action"], one["resource"], one["outcome"]) for one in records]


@pytest.fixture(scope="module")
def ada(server: Server) -> Person:
    return Person(server, "ada@example.com")


@pytest.fixture(scope="module")
def bob(server: Server) -> Person:
    return Person(server, "bob@example.com")


def test_the_life_of_a_model(server: Server, ada: Person, bob: Person) -> None:
    name = "tunedModels/numbers"
    operation = ada.call("POST", "tunedModels", job(), params={"tunedModelId": "numbers"})
    ada.call("POST", "tunedModels", job(), 409, params={"tunedModelId": "numbers"})
    ada.call("POST", f"{operation['name']}:cancel", {})
    ada.call("PATCH", name, {"description": "a secret of ada's", "temperature": 0.5})
    bob.call("DELETE", name, code=403)
    body = {"role": "READER", "granteeType": "USER", "emailAddress": bob.email}
    permission = ada.call("POST", f"{name}/permissions", body)["name"]
    bob.call("GET", name)
    bob.call("PATCH", name, {"temperature": 0.1}, 403)
    ada.call("PATCH", permission, {"role": "WRITER"}, params={"updateMask": "role"})
    ada.call("DELETE", permission)
    ada.call("DELETE", permission, code=404)
    ada.call("DELETE", operation["name"])
    ada.call("POST", f"{name}:transferOwnership", {"emailAddress": bob.email})
    bob.call("DELETE", name)
    records = recorded(server, "--model", "numbers")
    assert told(records) == [
        ("CreateTunedModel", name, "OK"),
        ("CreateTunedModel", name, "ALREADY_EXISTS"),
        ("CancelOperation", operation["name"], "OK"),
        ("UpdateTunedModel", name, "OK"),
        ("DeleteTunedModel", name, "PERMISSION_DENIED"),
        ("CreatePermission", permission, "OK"),
        ("UpdateTunedModel", name, "PERMISSION_DENIED"),
        ("UpdatePermission", permission, "OK"),
        ("DeletePermission", permission, "OK"),
        ("DeletePermission", permission, "NOT_FOUND"),
        ("DeleteOperation", operation["name"], "OK"),
        ("TransferOwnership", name, "OK"),
        ("DeleteTunedModel", name, "OK"),
    ]
    who = [one["account"] for one in records]
    assert who == ["ada@example.com"] * 4 + [bob.email, ada.email, bob.email] + [ada.email] * 5 + [bob.email]
    assert {one["address"] for one in records} == {"127.0.0.1"}
    details = [one["detail"] for one in records]
    assert details[0] == "from models/tiny-gemma3"
    assert details[3] == "description, temperature"
    assert details[5] == "READER for USER bob@example.com"
    assert details[7] == details[8] == "WRITER for USER bob@example.com"
    assert details[11] == "to bob@example.com"
    assert "a secret of ada's" not in json.dumps(records)


def test_reading_and_asking_leave_nothing(server: Server, ada: Person) -> None:
    before = len(recorded(server))
    ada.call("GET", "tunedModels")
    ada.call("GET", "models/tiny-gemma3")
    ada.call("POST", "models/tiny-gemma3:generateContent", {"contents": [{"parts": [{"text": "hi"}]}]})
    ada.call("POST", "tunedModels", {"display_name": "incomplete"}, 400)
    assert len(recorded(server)) == before


def test_a_made_up_id_is_recorded(server: Server, ada: Person) -> None:
    operation = ada.call("POST", "tunedModels", job(name="made up"))
    made = operation["name"].partition("/operations")[0]
    assert told(recorded(server, "--model", made)) == [("CreateTunedModel", made, "OK")]


def test_over_grpc(server: Server, ada: Person) -> None:
    metadata = (("x-goog-api-key", ada.headers["x-goog-api-key"]), ("x-goog-user-project", "my-project"))
    with grpc.insecure_channel(server.grpc) as channel:
        delete = channel.unary_unary(
            f"/{V1BETA}.ModelService/DeleteTunedModel",
            request_serializer=lambda message: message.SerializeToString(),
        )
        with pytest.raises(grpc.RpcError):
            delete(protos.DeleteTunedModelRequest(name="tunedModels/nowhere"), metadata=metadata)
    (one,) = recorded(server, "--model", "nowhere")
    assert (one["account"], one["action"], one["outcome"]) == (ada.email, "DeleteTunedModel", "PERMISSION_DENIED")
    assert (one["address"], one["project"]) == ("127.0.0.1", "my-project")


def test_commands(server: Server) -> None:
    start = len(recorded(server))
    server.run("accounts", "create", "zoe@example.com", "--password-stdin", input="not for the record\n")
    server.run("accounts", "create", "zoe@example.com", code=1)
    token = server.run("token", "zoe@example.com").strip()
    key = server.run("api-key", "create", "zoe@example.com").strip()
    server.run("groups", "create", "team@example.com")
    server.run("groups", "add", "team@example.com", "zoe@example.com")
    server.run("groups", "list")
    server.run("projects", "create", "my-project")
    server.run("projects", "add", "my-project", "zoe@example.com")
    server.run("accounts", "disable", "zoe@example.com")
    records = recorded(server)[start:]
    assert [(one["action"], one["outcome"]) for one in records] == [
        ("CreateAccount", "OK"),
        ("CreateAccount", "ALREADY_EXISTS"),
        ("IssueToken", "OK"),
        ("CreateApiKey", "OK"),
        ("CreateGroup", "OK"),
        ("AddToGroup", "OK"),
        ("CreateProject", "OK"),
        ("AddToProject", "OK"),
        ("DisableAccount", "OK"),
    ]
    assert {one["account"] for one in records} == {"administrator"}
    assert {one["credential"] for one in records} == {"command line"}
    assert all("@" in one["address"] for one in records)  # user@machine
    assert records[5]["resource"] == "groups/team@example.com"
    assert records[5]["detail"] == "zoe@example.com"
    whole = json.dumps(records)
    assert token not in whole
    assert key not in whole
    assert "not for the record" not in whole


def test_the_table(server: Server, ada: Person, bob: Person) -> None:
    model = ada.call("POST", "tunedModels", job(), params={"tunedModelId": "shown"})
    share_of_admin = server.tune(job(), tunedModelId="admins")
    share(server, share_of_admin["name"].partition("/operations")[0], "READER", bob.email)
    wide = {**server.environment, "COLUMNS": "200"}
    server.environment, narrow = wide, server.environment
    shown = server.run("audit", "--account", ada.email, "--since", "1h")
    server.environment = narrow
    head, *rows = shown.splitlines()
    assert head.split() == ["TIME", "WHO", "FROM", "DID", "OUTCOME"]
    assert model["name"].partition("/operations")[0] in rows[-1]
    assert all(ada.email in row for row in rows)
    assert "Nothing is on record" in server.run("audit", "--account", "nobody@example.com")
    assert "--since yesterday" in server.run("audit", "--since", "yesterday", code=1)


def test_pruning(server: Server) -> None:
    assert server.run("audit", "prune", "--before", "1d") == "Removed 0 records.\n"
    assert "PruneAudit" in [one["action"] for one in recorded(server)]
    assert "future" in server.run("audit", "prune", "--before", "2999-01-01", code=1)
