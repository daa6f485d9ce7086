"""Jobs have options, can rest, and leave events and a report"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("paused", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("options", sa.LargeBinary(), nullable=True))
    op.create_table(
        "events",
        sa.Column("job", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("message", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("job", "kind", "step", name="events_of_a_step"),
    )
    op.create_table(
        "reports",
        sa.Column("job", sa.String(), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("message", sa.LargeBinary(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("reports")
    op.drop_table("events")
    op.drop_column("jobs", "options")
    op.drop_column("jobs", "paused")
