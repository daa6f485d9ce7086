"""Rows to official messages."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store.tables import Job, Snapshot, TunedModel
from tunesmith.store.times import to_timestamp


def tuned_model_message(session: Session, row: TunedModel) -> protos.TunedModel:
    """Return a tuned model with its snapshots."""
    message = protos.TunedModel.FromString(row.message)
    snapshots = (
        select(Snapshot).join(Job, Job.id == Snapshot.job).where(Job.tuned_model == row.id).order_by(Snapshot.step)
    )
    for snapshot in session.scalars(snapshots):
        message.tuning_task.snapshots.add(
            step=snapshot.step,
            epoch=snapshot.epoch,
            mean_loss=snapshot.mean_loss,
            compute_time=to_timestamp(snapshot.compute_time_ns),
        )
    return message
