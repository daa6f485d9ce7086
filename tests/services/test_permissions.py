"""Sharing tuned models through the REST API of a running server."""

from typing import Any

import pytest

from people import Person, share
from servers import Server, job

OWNER = "admin@localhost"


@pytest.fixture(scope="module")
def ada(server: Server) -> Person:
    return Person(server, "ada@example.com")


@pytest.fixture(scope="module")
def bob(server: Server) -> Person:
    return Person(server, "bob@example.com")


@pytest.fixture
def model(server: Server) -> str:
    """A tuned model of the first account, not shared with anybody."""
    name: str = server.tune(job("shared", epochs=1))["metadata"]["tunedModel"]
    return name


def permissions(server: Server, model: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.call("GET", f"{model}/permissions?pageSize=1000")["permissions"]
    return found


def test_the_owner_is_listed_from_the_start(server: Server, model: str) -> None:
    (entry,) = permissions(server, model)
    assert entry == {"name": entry["name"], "granteeType": "USER", "emailAddress": OWNER, "role": "OWNER"}
    assert entry["name"].startswith(f"{model}/permissions/")
    assert server.call("GET", entry["name"]) == entry


def test_a_round_trip(server: Server, model: str, ada: Person) -> None:
    body = {"granteeType": 1, "emailAddress": "Ada@Example.com", "role": 3}
    made = server.call("POST", f"{model}/permissions", body)
    assert made == {
        "name": made["name"],
        "granteeType": "USER",
        "emailAddress": "ada@example.com",
        "role": "READER",
    }
    assert server.call("GET", made["name"]) == made
    assert permissions(server, model)[1:] == [made]
    assert ada.call("GET", model)["name"] == model
    ada.call("PATCH", model, {"description": "mine"}, code=403)
    # google-generativeai sends the immutable fields along.
    changed = server.call("PATCH", f"{made['name']}?updateMask=role", {"granteeType": 1, "role": 2})
    assert changed == {**made, "role": "WRITER"}
    assert ada.call("PATCH", model, {"description": "mine"})["description"] == "mine"
    assert server.call("DELETE", made["name"]) == {}
    ada.call("GET", model, code=403)
    server.call("GET", made["name"], code=404)
    server.call("DELETE", made["name"], code=404)


def test_a_grantee_has_one_permission(server: Server, model: str, ada: Person) -> None:
    made = share(server, model, "READER", ada.email)
    body = {"granteeType": "USER", "emailAddress": ada.email, "role": "WRITER"}
    error = server.call("POST", f"{model}/permissions", body, code=409)["error"]
    assert error["message"] == f"Permission {made['name']} already exists."
    assert server.call("POST", f"{model}/permissions", {**body, "emailAddress": OWNER}, code=409)
    assert permissions(server, model)[1:] == [made]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"granteeType": "USER", "emailAddress": "a@b"}, "permission.role"),
        ({"granteeType": "USER", "emailAddress": "a@b", "role": "OWNER"}, "permission.role"),
        ({"granteeType": "EVERYONE", "role": "WRITER"}, "permission.role"),
        ({"granteeType": "EVERYONE", "emailAddress": "a@b", "role": "READER"}, "permission.email_address"),
        ({"granteeType": "USER", "role": "READER"}, "permission.email_address"),
        ({"granteeType": "GROUP", "role": "READER"}, "permission.email_address"),
        ({"granteeType": "USER", "emailAddress": "ada", "role": "READER"}, "permission.email_address"),
        ({"role": "READER"}, "permission.email_address"),
    ],
)
def test_what_cannot_be_granted(server: Server, model: str, body: dict[str, Any], field: str) -> None:
    error = server.call("POST", f"{model}/permissions", body, code=400)["error"]
    assert error["message"].startswith(f"* CreatePermissionRequest.{field}: ")
    assert len(permissions(server, model)) == 1


def test_the_owners_entry_stays(server: Server, model: str, ada: Person) -> None:
    share(server, model, "WRITER", ada.email)
    name = permissions(server, model)[0]["name"]
    for caller in (server, ada):
        for method, body in (("PATCH", {"role": "WRITER"}), ("DELETE", None)):
            path = f"{name}?updateMask=role" if body else name
            error = caller.call(method, path, body, code=400)["error"]
            assert error["status"] == "FAILED_PRECONDITION"
            assert "transferOwnership" in error["message"]
    assert permissions(server, model)[0]["role"] == "OWNER"


def test_only_the_role_can_be_patched(server: Server, model: str) -> None:
    made = share(server, model, "READER", "new@example.com")
    body = {"role": "WRITER", "emailAddress": "other@example.com"}
    for mask in ("role,emailAddress", "granteeType", "name", "colour"):
        server.call("PATCH", f"{made['name']}?updateMask={mask}", body, code=400)
    server.call("PATCH", made["name"], body, code=400)
    error = server.call("PATCH", f"{made['name']}?updateMask=role", {"role": "OWNER"}, code=400)["error"]
    assert error["message"].startswith("* UpdatePermissionRequest.permission.role: OWNER cannot be granted")
    assert server.call("GET", made["name"]) == made
    assert server.call("PATCH", f"{made['name']}?updateMask=*", body) == {**made, "role": "WRITER"}


def test_ownership_is_given_away(server: Server, model: str, ada: Person) -> None:
    kept = share(server, model, "READER", ada.email)["name"]
    before = permissions(server, model)[0]["name"]
    assert server.call("POST", f"{model}:transferOwnership", {"emailAddress": ada.email}) == {}
    assert ada.call("GET", f"{model}/permissions")["permissions"] == [
        {"name": kept, "granteeType": "USER", "emailAddress": ada.email, "role": "OWNER"},
        {"name": before, "granteeType": "USER", "emailAddress": OWNER, "role": "WRITER"},
    ]
    server.call("PATCH", model, {"description": "still a writer"})
    error = server.call("DELETE", model, code=403)["error"]
    assert "takes the role OWNER, and yours is WRITER" in error["message"]
    server.call("POST", f"{model}:transferOwnership", {"emailAddress": OWNER}, code=403)
    ada.call("POST", f"{model}:transferOwnership", {"emailAddress": ada.email})  # to oneself changes nothing
    assert len(ada.call("GET", f"{model}/permissions")["permissions"]) == 2
    error = ada.call("POST", f"{model}:transferOwnership", {"emailAddress": "no@body"}, code=400)["error"]
    assert error["message"].startswith("* TransferOwnershipRequest.email_address: there is no account no@body")
    ada.call("POST", f"{model}:transferOwnership", {}, code=400)
    assert ada.call("DELETE", model) == {}


def test_a_group(server: Server, model: str, ada: Person, bob: Person) -> None:
    server.run("groups", "create", "team@example.com")
    server.run("groups", "add", "team@example.com", ada.email)
    made = server.call("POST", f"{model}/permissions", {"emailAddress": "team@example.com", "role": "WRITER"})
    assert made["granteeType"] == "GROUP"  # there is a group of that address
    assert server.run("groups", "list") == "team@example.com  ada@example.com\n"
    ada.call("PATCH", model, {"description": "by a member"})
    bob.call("GET", model, code=403)
    server.run("groups", "add", "team@example.com", bob.email)
    server.run("groups", "remove", "team@example.com", ada.email)
    bob.call("GET", model)
    ada.call("GET", model, code=403)
    server.run("groups", "delete", "team@example.com")
    bob.call("GET", model, code=403)
    assert len(permissions(server, model)) == 1


def test_a_role_waits_for_its_grantee(server: Server, model: str) -> None:
    share(server, model, "READER", "later@example.com")
    share(server, model, "READER", "later-group@example.com", "GROUP")
    Person(server, "later@example.com").call("GET", model)
    member = Person(server, "member@example.com")
    member.call("GET", model, code=403)
    server.run("groups", "create", "later-group@example.com")
    server.run("groups", "add", "later-group@example.com", member.email)
    member.call("GET", model)


def test_a_reader_sees_whom_to_ask_and_nobody_else(server: Server, model: str, ada: Person, bob: Person) -> None:
    own = share(server, model, "READER", ada.email)
    other = share(server, model, "READER", "secret@example.com")
    everyone = share(server, model, "READER", kind="EVERYONE")
    assert everyone == {"name": everyone["name"], "granteeType": "EVERYONE", "role": "READER"}
    owner = permissions(server, model)[0]
    assert ada.call("GET", f"{model}/permissions")["permissions"] == [owner, own, everyone]
    assert bob.call("GET", f"{model}/permissions")["permissions"] == [owner, everyone]
    ada.call("GET", own["name"])
    for name in (other["name"], f"{model}/permissions/never-was"):
        error = ada.call("GET", name, code=404)["error"]
        assert error["message"] == f"Permission {name} does not exist."


def test_pages_of_permissions(server: Server, model: str) -> None:
    made = [share(server, model, "READER", f"reader-{n}@example.com")["name"] for n in range(5)]
    seen: list[str] = []
    token = ""
    for _ in range(6):
        page = server.call("GET", f"{model}/permissions", params={"pageSize": 1, "pageToken": token})
        seen += [permission["name"] for permission in page["permissions"]]
        token = page.get("nextPageToken", "")
    assert token == ""
    assert seen[1:] == made


def test_a_project(server: Server, ada: Person, bob: Person) -> None:
    number = server.run("projects", "create", "lab").strip()
    assert server.run("projects", "create", "other", "--number", "77").strip() == "77"
    server.run("projects", "add", "lab", ada.email)
    server.run("projects", "add", "other", bob.email)
    assert server.run("projects", "list") == f"lab  {number}  {ada.email}\nother  77  {bob.email}\n"
    model = server.tune(job("for the lab", epochs=1, readerProjectNumbers=[number, "5"]))["metadata"]["tunedModel"]
    assert server.call("GET", model)["readerProjectNumbers"] == [number, "5"]

    def status(person: Person, project: str, path: str = model) -> int:
        headers = {**person.headers, "x-goog-user-project": project}
        return server.http.get(f"/v1beta/{path}", headers=headers).status_code

    assert [status(ada, "lab"), status(ada, number)] == [200, 200]
    assert [status(ada, "other"), status(ada, ""), status(ada, "5"), status(ada, "%")] == [403] * 4
    assert [status(bob, "lab"), status(bob, "other"), status(bob, "77")] == [403] * 3  # no member, not listed
    ada.headers["x-goog-user-project"] = "lab"
    assert model in ada.names()
    assert model in ada.names(filter="readers:me")
    assert model not in ada.names(filter="writers:me")
    del ada.headers["x-goog-user-project"]
    assert model not in ada.names()
    server.call("PATCH", f"{model}?updateMask=readerProjectNumbers", {"readerProjectNumbers": ["77"]})
    assert [status(ada, "lab"), status(bob, "other")] == [403, 200]
    server.run("projects", "remove", "other", bob.email)
    assert status(bob, "other") == 403
    server.run("projects", "add", "other", bob.email)
    assert status(bob, "77") == 200
    assert server.run("projects", "delete", "other") == "Deleted the project other.\n"
    assert [status(bob, "other"), status(bob, "77")] == [403, 403]
    assert server.run("projects", "create", "other", "--number", "77") == "77\n"
    assert status(bob, "other") == 403  # the members went with it
    server.run("projects", "delete", "77")
    assert server.run("projects", "list") == f"lab  {number}  {ada.email}\n"
    error = server.call("PATCH", model, {"readerProjectNumbers": ["-1"]}, code=400)["error"]
    assert "UpdateTunedModelRequest.tuned_model.reader_project_numbers[0]" in error["message"]


def test_the_project_of_a_request_is_logged(server: Server, ada: Person) -> None:
    headers = {**ada.headers, "x-goog-user-project": "who-pays"}
    server.http.get("/v1beta/tunedModels", headers=headers)
    log = (server.data_dir.parent / f"{server.data_dir.name}.log").read_text()
    assert "ModelService.ListTunedModels by ada@example.com for project 'who-pays'" in log


def test_who_could_see_a_model_learns_that_it_is_gone(
    server: Server, model: str, ada: Person, bob: Person
) -> None:
    share(server, model, "READER", ada.email)
    server.call("DELETE", model)
    assert server.call("GET", model, code=404)
    error = ada.call("GET", model, code=404)["error"]
    assert error["message"] == f"Tuned model {model} does not exist."
    assert bob.call("GET", model, code=403)["error"]["message"].startswith("You do not have permission to access")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "corpora/c/permissions", None),
        ("GET", "corpora/c/permissions/p", None),
        ("POST", "corpora/c/permissions", {"granteeType": "EVERYONE", "role": "READER"}),
        ("PATCH", "corpora/c/permissions/p?updateMask=role", {"role": "READER"}),
        ("DELETE", "corpora/c/permissions/p", None),
    ],
)
def test_permissions_of_corpora(server: Server, method: str, path: str, body: Any) -> None:
    assert "corpora" in server.call(method, path, body, code=501)["error"]["message"]


def test_bad_groups_and_projects(server: Server) -> None:
    for arguments, message in [
        (("groups", "create", "team"), "is not an e-mail address"),
        (("groups", "add", "nobody@x", "ada@example.com"), "There is no group nobody@x"),
        (("projects", "create", "Bad_Id"), "is not a project id"),
        (("projects", "create", "zero", "--number", "0"), "is not a project number"),
        (("projects", "add", "nothing", "ada@example.com"), "There is no project nothing"),
        (("projects", "delete", "nothing"), "There is no project nothing"),
        (("groups", "delete", "nobody@x"), "There is no group nobody@x"),
    ]:
        assert message in server.run(*arguments, code=1)
    server.run("projects", "create", "once")
    assert "There is a project once" in server.run("projects", "create", "once", code=1)
    assert "There is no account nobody@x" in server.run("projects", "add", "once", "nobody@x", code=1)
