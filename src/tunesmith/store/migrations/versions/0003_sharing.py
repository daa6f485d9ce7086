"""Sharing: permissions, groups, projects; what lists of tuned models are filtered by"""

import sqlalchemy as sa
from alembic import op

from tunesmith import protos

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "groups",
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("email"),
    )
    op.create_table(
        "projects",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
        sa.UniqueConstraint("id"),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "group_members",
        sa.Column("group", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["group"], ["groups.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("group", "account"),
    )
    op.create_index(op.f("ix_group_members_account"), "group_members", ["account"], unique=False)
    op.create_table(
        "project_members",
        sa.Column("project", sa.BigInteger(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["project"], ["projects.number"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("project", "account"),
    )
    op.create_index(op.f("ix_project_members_account"), "project_members", ["account"], unique=False)
    op.create_table(
        "permissions",
        sa.Column("tuned_model", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("grantee_type", sa.Integer(), nullable=False),
        sa.Column("grantee", sa.String(), nullable=False),
        sa.Column("role", sa.Integer(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["tuned_model"], ["tuned_models.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tuned_model", "id"),
    )
    op.create_index("permissions_by_grantee", "permissions", ["grantee_type", "grantee"], unique=False)
    op.add_column("tuned_models", sa.Column("search_text", sa.String(), server_default="", nullable=False))
    op.add_column("tuned_models", sa.Column("reader_projects", sa.String(), server_default="", nullable=False))
    op.alter_column("deleted_models", "owner", new_column_name="account")
    _fill()


def _fill() -> None:
    """Give the models that are there what the new columns hold."""
    models = sa.table(
        "tuned_models",
        sa.column("id", sa.String()),
        sa.column("message", sa.LargeBinary()),
        sa.column("search_text", sa.String()),
        sa.column("reader_projects", sa.String()),
    )
    connection = op.get_bind()
    for model_id, message in connection.execute(sa.select(models.c.id, models.c.message)).all():
        model = protos.TunedModel.FromString(message)
        connection.execute(
            sa.update(models)
            .where(models.c.id == model_id)
            .values(
                search_text=f"{model.display_name}\n{model.description}".casefold(),
                reader_projects="".join(f",{number}," for number in model.reader_project_numbers),
            )
        )


def downgrade() -> None:
    op.alter_column("deleted_models", "account", new_column_name="owner")
    op.drop_column("tuned_models", "reader_projects")
    op.drop_column("tuned_models", "search_text")
    for table in ("permissions", "project_members", "group_members", "secrets", "projects", "groups"):
        op.drop_table(table)
