"""The steps of jobs under way; those of a job that is done are part of its model's message."""

from collections.abc import Mapping

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from tunesmith import protos
from tunesmith.store.tables import Job, Snapshot
from tunesmith.store.times import to_timestamp


def add_snapshots(session: Session, models: Mapping[str, protos.TunedModel]) -> None:
    """Add to the messages of models, by their ids, the snapshots that are stored as rows."""
    for model_id, step, epoch, mean_loss, compute_time_ns in session.execute(_SNAPSHOTS, {"models": [*models]}):
        models[model_id].tuning_task.snapshots.add(
            step=step, epoch=epoch, mean_loss=mean_loss, compute_time=to_timestamp(compute_time_ns)
        )


_SNAPSHOTS = (
    select(Job.tuned_model, Snapshot.step, Snapshot.epoch, Snapshot.mean_loss, Snapshot.compute_time_ns)
    .join(Snapshot, Snapshot.job == Job.id)
    .where(Job.tuned_model.in_(bindparam("models", expanding=True)))
    .order_by(Job.tuned_model, Snapshot.step)
)
