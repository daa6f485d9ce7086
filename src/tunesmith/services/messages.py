"""Rows to official messages."""

from collections.abc import Sequence

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store.tables import Job, Permission, Snapshot, TunedModel
from tunesmith.store.times import to_timestamp


def tuned_model_message(session: Session, row: TunedModel) -> protos.TunedModel:
    """Return a tuned model with its snapshots."""
    return tuned_model_messages(session, [row])[0]


def tuned_model_messages(session: Session, rows: Sequence[TunedModel]) -> list[protos.TunedModel]:
    """Return tuned models with their snapshots, which come in one query for all of them."""
    messages = {row.id: protos.TunedModel.FromString(row.message) for row in rows}
    snapshots = session.connection().execute(_SNAPSHOTS, {"models": list(messages)})
    for model_id, step, epoch, mean_loss, compute_time_ns in snapshots:
        messages[model_id].tuning_task.snapshots.add(
            step=step, epoch=epoch, mean_loss=mean_loss, compute_time=to_timestamp(compute_time_ns)
        )
    return list(messages.values())


# Built once: most requests run it.
_SNAPSHOTS = (
    select(Job.tuned_model, Snapshot.step, Snapshot.epoch, Snapshot.mean_loss, Snapshot.compute_time_ns)
    .join(Snapshot, Snapshot.job == Job.id)
    .where(Job.tuned_model.in_(bindparam("models", expanding=True)))
    .order_by(Job.tuned_model, Snapshot.step)
)


def permission_message(row: Permission) -> protos.Permission:
    """Return a permission."""
    return protos.Permission(
        name=f"tunedModels/{row.tuned_model}/permissions/{row.id}",
        grantee_type=row.grantee_type,
        email_address=row.grantee or None,
        role=row.role,
    )
