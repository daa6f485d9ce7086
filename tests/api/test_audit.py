"""What the dispatcher leaves in the audit record, whatever the services do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.stand_ins import PREFIX, Backend
from tunesmith import protos
from tunesmith.api.dispatch import Dispatcher
from tunesmith.auth.scopes import TUNING_READONLY
from tunesmith.caller import Caller, Credentials
from tunesmith.errors import ApiError, PermissionDenied
from tunesmith.store.audit import Audit
from tunesmith.store.database import Database

KEY = Caller("ada@example.com", credential="API key 12ab", project="p")


class Everything:
    """A service with a method for every RPC."""

    def __getattr__(self, name: str) -> Any:
        def method(request: Any, caller: Caller) -> Any:
            return [] if name.startswith(("stream", "bidi")) else protos.Empty()

        return method


class KnowsAll:
    """Everybody is the same caller."""

    def verify(self, credentials: Credentials) -> Caller:
        return KEY


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[Audit]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    audit = Audit(database)
    yield audit
    audit.close()
    database.close()


CHANGES = {
    "CreateTunedModel",
    "UpdateTunedModel",
    "DeleteTunedModel",
    "CreatePermission",
    "UpdatePermission",
    "DeletePermission",
    "TransferOwnership",
    "CancelOperation",
    "DeleteOperation",
}
RPCS = [
    rpc
    for service in ("ModelService", "PermissionService", "GenerativeService", "TextService")
    for rpc in protos.SERVICES[PREFIX + service].methods
] + [*protos.SERVICES["google.longrunning.Operations"].methods]


@pytest.mark.parametrize("rpc", RPCS, ids=[rpc.name for rpc in RPCS])
def test_every_rpc_that_changes_something_is_recorded(audit: Audit, rpc: Any) -> None:
    service = rpc.containing_service.full_name
    dispatcher = Dispatcher({service: Everything()}, KnowsAll(), audit=audit)
    method = dispatcher._methods[rpc.full_name]
    request = protos.message_class(rpc.input_type)()
    if rpc.server_streaming:
        assert [*method(request, KEY)] == []
    else:
        method(request, KEY)
    recorded = [row.action for row in audit.newest(0)]
    assert recorded == ([rpc.name] if rpc.name in CHANGES else [])


def test_where_from_and_with_what(audit: Audit) -> None:
    rpc = protos.SERVICES["google.longrunning.Operations"].methods_by_name["CancelOperation"]
    dispatcher = Dispatcher({"google.longrunning.Operations": Everything()}, KnowsAll(), audit=audit)
    name = "tunedModels/x/operations/y"
    dispatcher.call(rpc, protos.CancelOperationRequest(name=name), Credentials(), address="192.0.2.7")
    audit.close()
    key_use, cancel = sorted(audit.newest(0), key=lambda row: row.action, reverse=True)
    assert (cancel.action, cancel.resource, cancel.credential) == ("CancelOperation", name, "API key 12ab")
    assert (key_use.action, key_use.resource) == ("UseApiKey", "apiKeys/12ab")
    assert cancel.address == key_use.address == "192.0.2.7"
    assert cancel.project == "p"


def test_a_change_for_which_the_credential_was_not_made(audit: Audit) -> None:
    class MayOnlySee:
        def verify(self, credentials: Credentials) -> Caller:
            return Caller("ada@example.com", frozenset({TUNING_READONLY}))

    service = f"{PREFIX}ModelService"
    dispatcher = Dispatcher({service: Everything()}, MayOnlySee(), audit=audit)
    rpc = protos.SERVICES[service].methods_by_name["DeleteTunedModel"]
    with pytest.raises(PermissionDenied):
        dispatcher.call(rpc, protos.DeleteTunedModelRequest(name="tunedModels/x"), Credentials())
    (row,) = audit.newest(0)
    assert (row.account, row.action, row.outcome) == ("ada@example.com", "DeleteTunedModel", "PERMISSION_DENIED")


def test_a_request_from_nobody_leaves_nothing(audit: Audit, backend: Backend) -> None:
    rpc = protos.SERVICES[f"{PREFIX}ModelService"].methods_by_name["DeleteTunedModel"]
    dispatcher = Dispatcher({f"{PREFIX}ModelService": backend.models}, backend.verifier, audit=audit)
    with pytest.raises(ApiError):
        dispatcher.call(rpc, protos.DeleteTunedModelRequest(name="tunedModels/x"), Credentials(bearer="bad"))
    assert audit.newest(0) == []
