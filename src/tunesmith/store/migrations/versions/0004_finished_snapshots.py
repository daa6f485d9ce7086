"""The snapshots of a job that is done are part of its model's message"""

import sqlalchemy as sa
from alembic import op

from tunesmith import protos
from tunesmith.store.times import to_timestamp

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

MODELS = sa.table("tuned_models", sa.column("id", sa.String()), sa.column("message", sa.LargeBinary()))
JOBS = sa.table(
    "jobs", sa.column("id", sa.String()), sa.column("tuned_model", sa.String()), sa.column("state", sa.String())
)
SNAPSHOTS = sa.table(
    "snapshots",
    sa.column("job", sa.String()),
    sa.column("step", sa.Integer()),
    sa.column("epoch", sa.Integer()),
    sa.column("mean_loss", sa.Float()),
    sa.column("compute_time_ns", sa.BigInteger()),
)


def upgrade() -> None:
    connection = op.get_bind()
    done = sa.select(JOBS.c.id, MODELS).join_from(JOBS, MODELS, MODELS.c.id == JOBS.c.tuned_model)
    for job, model_id, message in connection.execute(done.where(JOBS.c.state == "done")).all():
        model = protos.TunedModel.FromString(message)
        steps = sa.select(SNAPSHOTS).where(SNAPSHOTS.c.job == job).order_by(SNAPSHOTS.c.step)
        for row in connection.execute(steps):
            model.tuning_task.snapshots.add(
                step=row.step,
                epoch=row.epoch,
                mean_loss=row.mean_loss,
                compute_time=to_timestamp(row.compute_time_ns),
            )
        changed = sa.update(MODELS).where(MODELS.c.id == model_id)
        connection.execute(changed.values(message=model.SerializeToString()))
        connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.job == job))


def downgrade() -> None:
    connection = op.get_bind()
    done = sa.select(JOBS.c.id, MODELS).join_from(JOBS, MODELS, MODELS.c.id == JOBS.c.tuned_model)
    for job, model_id, message in connection.execute(done.where(JOBS.c.state == "done")).all():
        model = protos.TunedModel.FromString(message)
        for snapshot in model.tuning_task.snapshots:
            connection.execute(
                sa.insert(SNAPSHOTS).values(
                    job=job,
                    step=snapshot.step,
                    epoch=snapshot.epoch,
                    mean_loss=snapshot.mean_loss,
                    compute_time_ns=snapshot.compute_time.ToNanoseconds(),
                )
            )
        del model.tuning_task.snapshots[:]
        changed = sa.update(MODELS).where(MODELS.c.id == model_id)
        connection.execute(changed.values(message=model.SerializeToString()))
