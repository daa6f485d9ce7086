"""Rows to official messages."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store.snapshots import add_snapshots
from tunesmith.store.tables import Permission, TunedModel


def tuned_model_message(session: Session, row: TunedModel) -> protos.TunedModel:
    """Return a tuned model with its snapshots."""
    return tuned_model_messages(session, [row])[0]


def tuned_model_messages(session: Session, rows: Sequence[TunedModel]) -> list[protos.TunedModel]:
    """Return tuned models with their snapshots; those under way come in one query for all of them."""
    messages = {row.id: protos.TunedModel.FromString(row.message) for row in rows}
    under_way = {row.id: messages[row.id] for row in rows if row.state == protos.TunedModel.CREATING}
    if under_way:
        add_snapshots(session, under_way)
    return list(messages.values())


def permission_message(row: Permission) -> protos.Permission:
    """Return a permission."""
    return protos.Permission(
        name=f"tunedModels/{row.tuned_model}/permissions/{row.id}",
        grantee_type=row.grantee_type,
        email_address=row.grantee or None,
        role=row.role,
    )
