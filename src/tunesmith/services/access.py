"""Who may do what with a tuned model.

Roles contain each other. A reader sees the model and its operations and asks it; a writer also changes it,
shares it and cancels its operations; the owner also deletes it and gives it away. One holds a role by name (as a
user, in a group, through a project), or as one of everyone.
"""

from sqlalchemy import ColumnElement, String, and_, bindparam, cast, false, func, insert, literal, or_, select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.caller import Caller
from tunesmith.errors import NotFound, PermissionDenied
from tunesmith.store.tables import (
    Account,
    DeletedModel,
    GroupMember,
    Permission,
    Project,
    ProjectMember,
    TunedModel,
)

OWNER, WRITER, READER = protos.Permission.OWNER, protos.Permission.WRITER, protos.Permission.READER
"""The stronger role has the smaller number."""

USER, GROUP, EVERYONE = protos.Permission.USER, protos.Permission.GROUP, protos.Permission.EVERYONE


def tuned_model(
    session: Session, caller: Caller, name: str, role: int = READER, *, lock: bool = False
) -> TunedModel:
    """Return the row of `tunedModels/{id}` when the caller has the role or a stronger one.

    Args:
        session: An open session.
        caller: Who asks.
        name: The model's resource name.
        role: The weakest role that will do.
        lock: Make others who ask for the lock wait for the end of the transaction.

    Raises:
        NotFound: It could be seen by the caller, and is deleted.
        PermissionDenied: The caller's role is too weak; or there is none, or no such model: only who has a role
            may tell these two apart.
    """
    model_id = name.removeprefix("tunedModels/")
    row = session.scalars(_LOCKED if lock else _PLAIN, {"id": model_id}).first()
    deleted = session.get(DeletedModel, (model_id, caller.account)) if row is None else None
    if deleted is not None:
        raise NotFound(f"Tuned model {name} does not exist.")
    held = role_of(session, caller, row) if row is not None else None
    if row is None or held is None:
        raise PermissionDenied(f"You do not have permission to access tuned model {name}.")
    if held > role:
        raise PermissionDenied(
            f"You do not have permission to do this with tuned model {name}: it takes the role "
            f"{protos.Permission.Role.Name(role)}, and yours is {protos.Permission.Role.Name(held)}."
        )
    return row


# Built once: most requests run it.
_PLAIN = select(TunedModel).where(TunedModel.id == bindparam("id"))
_LOCKED = _PLAIN.with_for_update()


def role_of(session: Session, caller: Caller, model: TunedModel) -> int | None:
    """Return the strongest role that the caller has, in whatever way; None without any."""
    if model.owner == caller.account:
        return OWNER
    granted = select(func.min(Permission.role)).where(
        Permission.tuned_model == model.id, or_(names(caller), Permission.grantee_type == EVERYONE)
    )
    role = session.scalar(granted)
    if role is None and model.reader_projects and session.scalar(select(_in_reader_project(caller, model))):
        return READER
    return role


def may_change(session: Session, caller: Caller, name: str) -> bool:
    """Return whether the caller is a writer or the owner of a tuned model."""
    row = session.scalars(_PLAIN, {"id": name.removeprefix("tunedModels/")}).first()
    held = role_of(session, caller, row) if row is not None else None
    return held is not None and held <= WRITER


def names(caller: Caller) -> ColumnElement[bool]:
    """The permissions that mean the caller, as a user or in a group."""
    groups = select(GroupMember.group).where(GroupMember.account == caller.account)
    in_group: ColumnElement[bool] = Permission.grantee.in_(groups)
    if caller.groups:
        in_group = or_(in_group, Permission.grantee.in_(caller.groups))
    return or_(
        and_(Permission.grantee_type == USER, Permission.grantee == caller.account),
        and_(Permission.grantee_type == GROUP, in_group),
    )


def has_by_name(caller: Caller, role: int) -> ColumnElement[bool]:
    """The tuned models for which the caller has the role or a stronger one, not counting what everyone has."""
    granted = select(Permission.tuned_model).where(names(caller), Permission.role <= role)
    return or_(
        TunedModel.owner == caller.account,
        TunedModel.id.in_(granted) if role > OWNER else false(),
        _in_reader_project(caller) if role == READER else false(),
    )


def is_public() -> ColumnElement[bool]:
    """The tuned models that are shared with everyone."""
    return TunedModel.id.in_(select(Permission.tuned_model).where(Permission.grantee_type == EVERYONE))


def remember_who_knew(session: Session, model: TunedModel) -> None:
    """Note, before a model is deleted, which accounts could see it: they will be told that it is gone."""
    shared = select(Permission.grantee).where(Permission.tuned_model == model.id)
    members = select(GroupMember.account).where(
        GroupMember.group.in_(shared.where(Permission.grantee_type == GROUP))
    )
    known = select(DeletedModel.account).where(DeletedModel.id == model.id)
    knew = select(literal(model.id), Account.email).where(
        or_(
            Account.email == model.owner,
            Account.email.in_(shared.where(Permission.grantee_type == USER)),
            Account.email.in_(members),
            shared.where(Permission.grantee_type == EVERYONE).exists(),
        ),
        Account.email.not_in(known),
    )
    session.execute(insert(DeletedModel).from_select(["id", "account"], knew))


def _in_reader_project(caller: Caller, model: TunedModel | None = None) -> ColumnElement[bool]:
    """Whether a model lists the project that the request names, by id or number, and the caller is in it."""
    if not caller.project:
        return false()
    listed = literal(model.reader_projects) if model is not None else TunedModel.reader_projects
    number = cast(Project.number, String)
    return (
        select(Project.number)
        .join(ProjectMember, ProjectMember.project == Project.number)
        .where(
            ProjectMember.account == caller.account,
            or_(Project.id == caller.project, number == caller.project),
            listed.contains(literal(",") + number + literal(",")),
        )
        .exists()
    )
