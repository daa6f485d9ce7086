"""Every method x credential x role x state of the model answers with the code that the reference gives."""

import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import pytest

from servers import Server, job
from tunesmith import protos
from tunesmith.auth.accounts import Accounts
from tunesmith.auth.api_keys import ApiKeys
from tunesmith.auth.scopes import CLOUD_PLATFORM, GENERATIVE_LANGUAGE, NEEDED, TUNING, TUNING_READONLY
from tunesmith.auth.tokens import AccessTokens
from tunesmith.store.database import Database
from tunesmith.store.tables import ApiKey, DeletedModel, Job, Permission, TunedModel

ROLES = ("none", "public", "project reader", "group reader", "reader", "writer", "owner")
READERS = {"public", "project reader", "group reader", "reader", "writer", "owner"}
WRITERS = {"writer", "owner"}
OWNERS = {"owner"}

GOOD = ("token", "cloud-platform token", "generative-language token", "tuning token", "key")
LIMITED = ("read-only token", "read-only key")  # good for what changes nothing and asks no model
BAD = {
    "nothing": 403,
    "token for something else": 403,
    "bad token": 401,
    "malformed token": 401,
    "expired token": 401,
    "bad key": 400,
    "expired key": 400,
    "revoked key": 400,
    "disabled account's token": 401,
}
STATES = ("CREATING", "ACTIVE", "FAILED", "deleted", "never was")

numbers = itertools.count(1)


@dataclass(frozen=True)
class Method:
    """A call, who may make it, and what it is to scopes and states."""

    name: str
    allowed: set[str]
    http: str
    path: str
    body: Any = None
    sees: bool = False
    """Whether a read-only scope is enough."""
    asks: bool = False
    """Whether it takes a model that has weights."""
    steers: bool = False
    """Whether it takes a job that is not done."""


NEW = "somebody new"
QUESTION = {"contents": {"parts": {"text": "1"}}, "generationConfig": {"maxOutputTokens": 1}}
METHODS = [
    Method("GetTunedModel", READERS, "GET", "{model}", sees=True),
    Method("GenerateContent", READERS, "POST", "{model}:generateContent", QUESTION, asks=True),
    Method("StreamGenerateContent", READERS, "POST", "{model}:streamGenerateContent", QUESTION, asks=True),
    Method("CountTokens", READERS, "POST", "{model}:countTokens", {"contents": QUESTION["contents"]}, asks=True),
    Method("GetOperation", READERS, "GET", "{operation}", sees=True),
    Method("ListOperations", READERS, "GET", "{model}/operations", sees=True),
    Method("WaitOperation", READERS, "POST", "{operation}:wait", {"timeout": "0.01s"}, sees=True),
    Method("ListPermissions", READERS, "GET", "{model}/permissions", sees=True),
    Method("GetPermission", WRITERS, "GET", "{permission}", sees=True),
    Method("UpdateTunedModel", WRITERS, "PATCH", "{model}", {"description": "changed"}),
    Method("CreatePermission", WRITERS, "POST", "{model}/permissions", {"role": "READER", "emailAddress": NEW}),
    Method("UpdatePermission", WRITERS, "PATCH", "{permission}?updateMask=role", {"role": "READER"}),
    Method("DeletePermission", WRITERS, "DELETE", "{permission}"),
    Method("CancelOperation", WRITERS, "POST", "{operation}:cancel", {}),
    Method("DeleteOperation", WRITERS, "DELETE", "{operation}"),
    # Of streams that may never end, and of files, the headers will do.
    Method("WatchTuning", READERS, "HEAD", "{model}:watch", sees=True),
    Method("GetTuningReport", READERS, "GET", "{model}:report", sees=True),
    Method("PauseTuning", WRITERS, "POST", "{model}:pause", {}, steers=True),
    Method("ResumeTuning", WRITERS, "POST", "{model}:resume", {}, steers=True),
    Method("ExportTunedModel", WRITERS, "HEAD", "{model}:export?format=PEFT", asks=True),
    Method("TransferOwnership", OWNERS, "POST", "{model}:transferOwnership", {"emailAddress": "heir@x"}),
    Method("DeleteTunedModel", OWNERS, "DELETE", "{model}"),
]


def expected(method: Method, credential: str, role: str, state: str) -> int:
    """The whole of who may do what."""
    if credential in BAD:
        return BAD[credential]
    if credential in LIMITED and not method.sees:
        return 403
    if role == "none" or state == "never was":
        return 403
    if state == "deleted":
        # Who reached it through a project knew it no longer than the request that named the project.
        return 403 if role == "project reader" else 404
    if role not in method.allowed:
        return (
            404 if method.name == "GetPermission" else 403
        )  # a reader sees only the permissions that concern them
    if (method.asks and state != "ACTIVE") or (method.steers and state != "CREATING"):
        return 400
    return 200


class Cast:
    """The people with all their credentials, and a new model for each call."""

    def __init__(self, server: Server, database: Database) -> None:
        self.server, self.database = server, database
        self.http = HTTPConnection(server.url.removeprefix("http://"))  # ten thousand calls are to be quick
        server.run("groups", "create", "team@x")
        server.run("projects", "create", "lab")
        accounts = Accounts(database)
        for email in ("heir@x", "disabled@x", *map(self.email, ROLES)):
            accounts.create(email)
        self.number = server.run("projects", "list").split()[1]
        server.run("groups", "add", "team@x", self.email("group reader"))
        server.run("projects", "add", "lab", self.email("project reader"))
        self.headers = {(role, kind): headers for role in ROLES for kind, headers in self._credentials(role)}
        accounts.disable("disabled@x")
        operation = server.finished(server.tune(job("real", epochs=1)))
        self.real = operation["metadata"]["tunedModel"].removeprefix("tunedModels/")

    @staticmethod
    def email(role: str) -> str:
        return f"{role.replace(' ', '-')}@x"

    def _credentials(self, role: str) -> Iterator[tuple[str, dict[str, str]]]:
        tokens, keys, email = AccessTokens(self.database), ApiKeys(self.database), self.email(role)

        def token(*scopes: str, account: str = email, seconds: float = 3600) -> dict[str, str]:
            return {"authorization": f"Bearer {tokens.create(account, scopes, seconds)}"}

        def key(**options: Any) -> dict[str, str]:
            return {"x-goog-api-key": keys.create(email, **options)[1]}

        revoked_id, revoked = keys.create(email)
        keys.revoke(revoked_id)
        expired_id, expired = keys.create(email, seconds=3600)
        with self.database.write() as session:
            session.get_one(ApiKey, expired_id).expire_time = time.time() - 1
        found = {
            "token": token(CLOUD_PLATFORM, TUNING),
            "cloud-platform token": token(CLOUD_PLATFORM),
            "generative-language token": token(GENERATIVE_LANGUAGE),
            "tuning token": token(TUNING),
            "key": key(),
            "read-only token": token(TUNING_READONLY),
            "read-only key": key(scopes=[TUNING_READONLY]),
            "nothing": {},
            "token for something else": token("openid", "https://www.googleapis.com/auth/drive"),
            "bad token": {"authorization": "Bearer tst.unknown"},
            "malformed token": {"authorization": "Bearer {}"},
            "expired token": token(CLOUD_PLATFORM, seconds=-1),
            "bad key": {"x-goog-api-key": "tsk_unknown"},
            "expired key": {"x-goog-api-key": expired},
            "revoked key": {"x-goog-api-key": revoked},
            "disabled account's token": token(CLOUD_PLATFORM, account="disabled@x"),
        }
        project = {"x-goog-user-project": "lab"} if role == "project reader" else {}
        yield from ((kind, {"authorization": "", **headers, **project}) for kind, headers in found.items())

    def model(self, state: str, public: bool) -> dict[str, str]:
        """Write a model in a state, as the services leave one, and return its names."""
        model_id = f"m{next(numbers)}"
        names = {
            "model": f"tunedModels/{model_id}",
            "operation": f"tunedModels/{model_id}/operations/j{model_id}",
            "permission": f"tunedModels/{model_id}/permissions/u1",
        }
        owner = self.email("owner")
        if state == "never was":
            return names
        with self.database.write() as session:
            if state == "deleted":
                knew = (role for role in ROLES if role not in ("none", "project reader"))
                session.add_all(DeletedModel(id=model_id, account=self.email(role)) for role in knew)
                return names
            real = session.get_one(TunedModel, self.real)
            message = protos.TunedModel.FromString(real.message)
            message.name, message.state = names["model"], protos.TunedModel.State.Value(state)
            message.reader_project_numbers.append(int(self.number))
            adapter = f"adapters/{model_id}" if state == "ACTIVE" else None
            session.add(
                TunedModel(
                    id=model_id,
                    owner=owner,
                    base=real.base,
                    message=message.SerializeToString(),
                    state=message.state,
                    create_time=time.time(),
                    adapter=real.adapter if adapter else None,
                )
            )
            session.flush()
            session.add(
                Job(
                    id=f"j{model_id}",
                    tuned_model=model_id,
                    state="running" if state == "CREATING" else "done",
                    training_data=b"",
                    seed=0,
                    total_steps=3,
                    create_time=time.time(),
                    worker="somebody",
                    lease_until=time.time() + 3600,
                    error=protos.Status(code=9, message="no").SerializeToString() if state == "FAILED" else None,
                )
            )
            shared = [(1, "writer", protos.Permission.WRITER), (1, "reader", protos.Permission.READER)]
            for kind, role, level in shared:
                session.add(self._permission(model_id, f"{role}", kind, self.email(role), level))
            session.add(
                self._permission(model_id, "u1", 1, "somebody@elsewhere.example", protos.Permission.READER)
            )
            session.add(self._permission(model_id, "g", 2, "team@x", protos.Permission.READER))
            if public:
                session.add(self._permission(model_id, "everyone", 3, "", protos.Permission.READER))
        return names

    @staticmethod
    def _permission(model_id: str, permission_id: str, kind: int, grantee: str, role: int) -> Permission:
        return Permission(
            tuned_model=model_id,
            id=permission_id,
            grantee_type=kind,
            grantee=grantee,
            role=role,
            create_time=time.time(),
        )

    def call(self, method: Method, credential: str, role: str, names: dict[str, str]) -> tuple[int, str]:
        body = method.body
        if body and body.get("emailAddress") == NEW:
            body = {**body, "emailAddress": f"new-{next(numbers)}@x"}
        path = f"/v1beta/{method.path.format(**names)}"
        headers = self.headers[role, credential]
        sent = None if body is None else json.dumps(body)
        self.http.request(method.http, path, sent, {name: value for name, value in headers.items() if value})
        response = self.http.getresponse()
        return response.status, response.read().decode()


@pytest.fixture(scope="module")
def server(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: there will be ten thousand models."""
    with Server(tmp_path_factory.mktemp("data"), tiny) as running:
        yield running


@pytest.fixture(scope="module")
def cast(server: Server) -> Iterator[Cast]:
    database = Database(f"sqlite:///{server.data_dir / 'tunesmith.db'}")
    cast = Cast(server, database)
    yield cast
    cast.http.close()
    database.close()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_who_may(cast: Cast, method: Method, state: str) -> None:
    wrong = []
    for role in ROLES:
        names = cast.model(state, public=role == "public")
        for credential in (*BAD, *LIMITED, *GOOD):
            status, text = cast.call(method, credential, role, names)
            right = expected(method, credential, role, state)
            if status != right:
                wrong.append((role, credential, status, right, text))
            if status == 200:  # it may have spent the model
                names = cast.model(state, public=role == "public")
    assert wrong == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_strangers_cannot_tell_what_there_is(cast: Cast, method: Method) -> None:
    """The answer for a model that is there reads as the one for a model that never was."""
    told = set()
    for state in STATES:
        names = cast.model(state, public=False)
        status, text = cast.call(method, "token", "none", names)
        told.add((status, re.sub(r"\bj?m\d+\b", "X", text)))
    assert len(told) == 1, told


TEXT = {"content": {"parts": {"text": "1"}}}
EMBED = {"requests": [{"model": "models/tiny-gemma3", **TEXT}]}
ELSEWHERE = [
    Method("GetModel", set(ROLES), "GET", "models/tiny-gemma3", sees=True),
    Method("ListModels", set(ROLES), "GET", "models", sees=True),
    Method("ListTunedModels", set(ROLES), "GET", "tunedModels", sees=True),
    Method("CreateTunedModel", set(ROLES), "POST", "tunedModels", job("more", epochs=1)),
    Method("TuneModel", set(ROLES), "POST", "tunedModels:tune", {"tunedModel": job("more", epochs=1)}),
    Method(
        "EmbedContent",
        set(ROLES),
        "POST",
        "models/tiny-gemma3:embedContent",
        {"content": {"parts": {"text": "1"}}},
    ),
    Method("BatchEmbedContents", set(ROLES), "POST", "models/tiny-gemma3:batchEmbedContents", EMBED),
    Method("GenerateText", set(ROLES), "POST", "models/tiny-gemma3:generateText", {"prompt": {"text": "1"}}),
    Method("CountTextTokens", set(ROLES), "POST", "models/tiny-gemma3:countTextTokens", {"prompt": {"text": "1"}}),
]


@pytest.mark.parametrize("method", ELSEWHERE, ids=lambda method: method.name)
def test_what_belongs_to_nobody(cast: Cast, method: Method) -> None:
    told = {kind: cast.call(method, kind, "none", {})[0] for kind in (*BAD, *LIMITED, *GOOD)}
    limited = 200 if method.sees else 403
    assert told == {**BAD, **dict.fromkeys(LIMITED, limited), **dict.fromkeys(GOOD, 200)}


def test_no_method_is_left_out() -> None:
    assert {method.rpartition(".")[2] for method in NEEDED} == {method.name for method in [*METHODS, *ELSEWHERE]}
