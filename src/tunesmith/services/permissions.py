"""PermissionService: with whom a tuned model is shared."""

import hashlib
import re
import time

from sqlalchemy import Select, or_, select, tuple_
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from tunesmith.services import access, paging
from tunesmith.services.access import EVERYONE, GROUP, OWNER, READER, USER, WRITER
from tunesmith.services.messages import permission_message
from tunesmith.store import audit
from tunesmith.store.database import Database
from tunesmith.store.tables import Account, Group, Permission, TunedModel

DEFAULT_PAGE = 10
_ADDRESS = re.compile(r"[^@\s/]+@[^@\s/]+")


class PermissionService:
    """google.ai.generativelanguage.v1beta.PermissionService.

    Permissions are managed by writers. A reader sees those that give them their role, and the owner's: whom to ask
    for more, and nobody else's address.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tokens = paging.PageTokens(database)

    def create_permission(self, request: protos.CreatePermissionRequest, caller: Caller) -> protos.Permission:
        """Share a tuned model.

        The grantee need not be known here yet: a role waits for the account or the group to be made. An address
        without a grantee type is a group's when there is one, else a user's.

        Raises:
            InvalidArgument: The grantee or the role cannot be.
            AlreadyExists: The grantee has a permission.
        """
        given, path = request.permission, "CreatePermissionRequest.permission"
        email = given.email_address.strip().lower()
        with self._database.write() as session:
            model = access.tuned_model(session, caller, _model(request.parent), WRITER, lock=True)
            kind = given.grantee_type or _kind(session, email)
            _check_grantee(kind, email, path)
            _check_role(kind, given.role, path)
            row = Permission(
                tuned_model=model.id,
                id=permission_id(kind, email),
                grantee_type=kind,
                grantee=email,
                role=given.role,
                create_time=time.time(),
            )
            message = permission_message(row)
            audit.note(message.name, _told(row))
            if session.get(Permission, (model.id, row.id)) or row.id == _owners(model).id:
                raise AlreadyExists(f"Permission {message.name} already exists.")
            session.add(row)
        return message

    def get_permission(self, request: protos.GetPermissionRequest, caller: Caller) -> protos.Permission:
        """Return a permission."""
        with self._database.read() as session:
            model = access.tuned_model(session, caller, _model(request.name))
            owners, wanted = _owners(model), _id(request.name)
            if wanted == owners.id:
                return permission_message(owners)
            row = session.scalars(_seen(session, caller, model).where(Permission.id == wanted)).first()
            if row is None:
                raise NotFound(f"Permission {request.name} does not exist.")
            return permission_message(row)

    def list_permissions(
        self, request: protos.ListPermissionsRequest, caller: Caller
    ) -> protos.ListPermissionsResponse:
        """Return a model's permissions, the owner's first, then in the order in which they were given."""
        size = paging.page_size(request.page_size, DEFAULT_PAGE, "ListPermissionsRequest")
        call = ("permissions", caller.account, request.parent)
        after = self._tokens.decode(request.page_token, *call, request="ListPermissionsRequest")
        with self._database.read() as session:
            model = access.tuned_model(session, caller, _model(request.parent))
            seen = _seen(session, caller, model).order_by(Permission.create_time, Permission.id).limit(size + 1)
            if after:
                rows = [*session.scalars(seen.where(tuple_(Permission.create_time, Permission.id) > after))]
            else:
                rows = [_owners(model), *session.scalars(seen)]
        response = protos.ListPermissionsResponse(permissions=[permission_message(row) for row in rows[:size]])
        if len(rows) > size:
            last = rows[size - 1]
            response.next_page_token = self._tokens.encode((last.create_time, last.id), *call)
        return response

    def update_permission(self, request: protos.UpdatePermissionRequest, caller: Caller) -> protos.Permission:
        """Change the role of a permission, which is all of it that can change.

        Raises:
            InvalidArgument: The mask names something else, or the role cannot be.
            FailedPrecondition: It is the owner's.
        """
        given = request.permission
        for field in request.update_mask.paths:
            if field not in ("role", "*"):
                reason = f"{field!r} cannot be updated; role can"
                raise InvalidArgument.at([("UpdatePermissionRequest.update_mask", reason)])
        with self._database.write() as session:
            row = _others(session, caller, given.name)
            _check_role(row.grantee_type, given.role, "UpdatePermissionRequest.permission")
            row.role = given.role
            audit.note(detail=_told(row))
            return permission_message(row)

    def delete_permission(self, request: protos.DeletePermissionRequest, caller: Caller) -> protos.Empty:
        """Take a permission away.

        Raises:
            FailedPrecondition: It is the owner's.
        """
        with self._database.write() as session:
            row = _others(session, caller, request.name)
            audit.note(detail=_told(row))
            session.delete(row)
        return protos.Empty()

    def transfer_ownership(
        self, request: protos.TransferOwnershipRequest, caller: Caller
    ) -> protos.TransferOwnershipResponse:
        """Make another account the owner; the owner of before becomes a writer.

        Raises:
            InvalidArgument: There is no such account, or it is disabled.
        """
        email = request.email_address.strip().lower()
        audit.note(detail=f"to {email}")
        with self._database.write() as session:
            model = access.tuned_model(session, caller, _model(request.name), OWNER, lock=True)
            account = session.get(Account, email)
            if account is None or account.disabled:
                reason = f"there is no account {email} that could own it"
                raise InvalidArgument.at([("TransferOwnershipRequest.email_address", reason)])
            if email != model.owner:
                before = _owners(model)
                before.role, before.create_time = WRITER, time.time()
                if held := session.get(Permission, (model.id, permission_id(USER, email))):
                    session.delete(held)
                session.add(before)
                model.owner = email
        return protos.TransferOwnershipResponse()


def _told(row: Permission) -> str:
    """Return what a permission gives, in a few words."""
    role, kind = protos.Permission.Role.Name(row.role), protos.Permission.GranteeType.Name(row.grantee_type)
    return f"{role} for {kind} {row.grantee}".rstrip()


def permission_id(grantee_type: int, email: str) -> str:
    """Return the id of a grantee's permission, the same whatever its role."""
    return hashlib.sha256(f"{grantee_type} {email}".encode()).hexdigest()[:16]


def _owners(model: TunedModel) -> Permission:
    """Return the owner's permission, which is no row of its own."""
    return Permission(
        tuned_model=model.id,
        id=permission_id(USER, model.owner),
        grantee_type=USER,
        grantee=model.owner,
        role=OWNER,
        create_time=0.0,
    )


def _model(name: str) -> str:
    """Return the tuned model that a permission belongs to."""
    if name.startswith("corpora/"):
        raise Unimplemented("Permissions of corpora are not implemented by this server.")
    return name.partition("/permissions/")[0]


def _id(name: str) -> str:
    return name.partition("/permissions/")[2]


def _seen(session: Session, caller: Caller, model: TunedModel) -> Select[Permission]:
    """Return the permissions of a model that the caller may see, but for the owner's."""
    rows = select(Permission).where(Permission.tuned_model == model.id)
    if access.role_of(session, caller, model) == READER:
        rows = rows.where(or_(access.names(caller), Permission.grantee_type == EVERYONE))
    return rows


def _others(session: Session, caller: Caller, name: str) -> Permission:
    """Return a permission that a writer may change: any but the owner's."""
    model = access.tuned_model(session, caller, _model(name), WRITER, lock=True)
    if _id(name) == _owners(model).id:
        raise FailedPrecondition(
            f"Permission {name} is the owner's: it changes when the model is given away with transferOwnership."
        )
    row = session.get(Permission, (model.id, _id(name)))
    if row is None:
        raise NotFound(f"Permission {name} does not exist.")
    return row


def _kind(session: Session, email: str) -> int:
    """Return the grantee type of an address that came without."""
    return GROUP if session.get(Group, email) else USER


def _check_grantee(kind: int, email: str, path: str) -> None:
    if kind == EVERYONE and email:
        raise InvalidArgument.at([(f"{path}.email_address", "must not be set when grantee_type is EVERYONE")])
    if kind not in (USER, GROUP, EVERYONE):
        raise InvalidArgument.at([(f"{path}.grantee_type", "must be USER, GROUP or EVERYONE")])
    if kind != EVERYONE and not _ADDRESS.fullmatch(email):
        reason = f"must be the e-mail address of a user or a group, not {email!r}"
        missing = "email_address is not specified; only grantee_type EVERYONE goes without"
        raise InvalidArgument.at([(f"{path}.email_address", reason if email else missing)])


def _check_role(kind: int, role: int, path: str) -> None:
    if role == OWNER:
        reason = "OWNER cannot be granted: a model has one owner; to give it away, call transferOwnership"
    elif role not in (WRITER, READER):
        reason = "must be WRITER or READER"
    elif kind == EVERYONE and role != READER:
        reason = "must be READER when grantee_type is EVERYONE"
    else:
        return
    raise InvalidArgument.at([(f"{path}.role", reason)])
