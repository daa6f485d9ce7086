"""API keys have a name, scopes, an end, and the time of their last use"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("name", "scopes"):
        op.add_column("api_keys", sa.Column(name, sa.String(), server_default="", nullable=False))
    for name in ("expire_time", "last_use_time"):
        op.add_column("api_keys", sa.Column(name, sa.Double(), nullable=True))


def downgrade() -> None:
    for name in ("last_use_time", "expire_time", "scopes", "name"):
        op.drop_column("api_keys", name)
