"""Jobs remember that memory ran out"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("micro_batch_tokens", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "micro_batch_tokens")
