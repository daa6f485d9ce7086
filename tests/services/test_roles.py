"""Every method, called in every role, answers with the code that the role earns."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from people import Person, share
from servers import Server, job

ROLES = ("none", "public", "project reader", "group reader", "reader", "writer", "owner")
READERS = {"public", "project reader", "group reader", "reader", "writer", "owner"}
WRITERS = {"writer", "owner"}
OWNERS = {"owner"}

numbers = itertools.count(1)


@dataclass(frozen=True)
class Method:
    """A call, who may make it, and whether it leaves a model that the next call cannot use."""

    name: str
    allowed: set[str]
    http: str
    path: str
    body: Any = None
    spends: bool = False


NEW = "somebody new"
QUESTION = {"contents": {"parts": {"text": "1"}}, "generationConfig": {"maxOutputTokens": 2}}
METHODS = [
    Method("GetTunedModel", READERS, "GET", "{model}"),
    Method("GenerateContent", READERS, "POST", "{model}:generateContent", QUESTION),
    Method("StreamGenerateContent", READERS, "POST", "{model}:streamGenerateContent", QUESTION),
    Method("CountTokens", READERS, "POST", "{model}:countTokens", {"contents": QUESTION["contents"]}),
    Method("GetOperation", READERS, "GET", "{operation}"),
    Method("ListOperations", READERS, "GET", "{model}/operations"),
    Method("ListPermissions", READERS, "GET", "{model}/permissions"),
    Method("GetPermission", WRITERS, "GET", "{permission}"),
    Method("UpdateTunedModel", WRITERS, "PATCH", "{model}", {"description": "changed"}),
    Method("CreatePermission", WRITERS, "POST", "{model}/permissions", {"role": "READER", "emailAddress": NEW}),
    Method("UpdatePermission", WRITERS, "PATCH", "{permission}?updateMask=role", {"role": "READER"}),
    Method("DeletePermission", WRITERS, "DELETE", "{permission}", spends=True),
    Method("CancelOperation", WRITERS, "POST", "{operation}:cancel", {}),
    Method("DeleteOperation", WRITERS, "DELETE", "{operation}", spends=True),
    Method("TransferOwnership", OWNERS, "POST", "{model}:transferOwnership", {"emailAddress": "heir@x"}, True),
    Method("DeleteTunedModel", OWNERS, "DELETE", "{model}", spends=True),
]
HIDDEN = {"GetPermission": 404}  # a reader may ask, and sees only the permissions that concern them


class Cast:
    """The people, and models that are shared with them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        server.run("groups", "create", "team@x")
        self.number = server.run("projects", "create", "lab").strip()
        self.people = {
            role: Person(server, f"{role.replace(' ', '-')}@x", "lab" if role == "project reader" else None)
            for role in ROLES
            if role != "owner"
        }
        server.run("accounts", "create", "heir@x")
        server.run("groups", "add", "team@x", self.people["group reader"].email)
        server.run("projects", "add", "lab", self.people["project reader"].email)
        self.kept: dict[bool, dict[str, str]] = {}

    def names(self, role: str, spends: bool) -> dict[str, str]:
        """Return the names of a model that the role sees; a new one when the call is going to spend it."""
        public = role == "public"
        if spends:
            return self._new(public)
        if public not in self.kept:
            self.kept[public] = self._new(public)
        return self.kept[public]

    def _new(self, public: bool) -> dict[str, str]:
        body = job("shared", epochs=1, readerProjectNumbers=[self.number])
        operation = self.server.finished(self.server.tune(body))
        model = operation["metadata"]["tunedModel"]
        permission = share(self.server, model, "WRITER", self.people["writer"].email)
        share(self.server, model, "READER", self.people["reader"].email)
        share(self.server, model, "READER", "team@x", "GROUP")
        if public:
            share(self.server, model, "READER", kind="EVERYONE")
        else:
            permission = share(self.server, model, "READER", "somebody@elsewhere.example")
        return {"model": model, "operation": operation["name"], "permission": permission["name"]}

    def status(self, role: str) -> Callable[[str, str, Any], int]:
        """Return what makes a call in a role."""
        if role == "owner":
            http = self.server.http
            return lambda method, path, body: http.request(method, f"/v1beta/{path}", json=body).status_code
        return self.people[role].status


@pytest.fixture(scope="module")
def cast(server: Server) -> Cast:
    return Cast(server)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_in_a_role(cast: Cast, method: Method, role: str) -> None:
    may = role in method.allowed
    names = cast.names(role, method.spends and may)
    body = method.body
    if body and body.get("emailAddress") == NEW:
        body = {**body, "emailAddress": f"new-{next(numbers)}@x"}
    refused = 403 if role == "none" else HIDDEN.get(method.name, 403)
    assert cast.status(role)(method.http, method.path.format(**names), body) == (200 if may else refused)
