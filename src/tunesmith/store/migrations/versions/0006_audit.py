"""The audit record, which is only ever added to; whose job it is, and who was served last"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A row goes only when a prune is on record that is later than the row: SQL that came in by a fault of ours can
# neither change the record nor shorten it without a trace.
ON_SQLITE = (
    "CREATE TRIGGER audit_never_changes BEFORE UPDATE ON audit"
    " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END",
    "CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit"
    " WHEN NOT EXISTS (SELECT 1 FROM audit WHERE prunes_before > OLD.time)"
    " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END",
    # INSERT OR REPLACE deletes without asking the trigger above.
    "CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit"
    " WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id)"
    " BEGIN SELECT RAISE(ABORT, 'the audit record is append-only'); END",
)
ON_POSTGRESQL = (
    "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF TG_OP = 'DELETE' THEN"
    "  IF EXISTS (SELECT 1 FROM audit WHERE prunes_before > OLD.time) THEN RETURN OLD; END IF;"
    " END IF;"
    " RAISE EXCEPTION 'the audit record is append-only'; END $$",
    "CREATE TRIGGER audit_is_kept BEFORE UPDATE OR DELETE ON audit"
    " FOR EACH ROW EXECUTE FUNCTION audit_is_append_only()",
    "CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON audit"
    " FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()",
)


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("credential", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("resource", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=True),
        sa.Column("prunes_before", sa.Double(), nullable=True),
        sa.CheckConstraint("prunes_before <= time", name="audit_prunes_the_past"),
        sa.PrimaryKeyConstraint("id"),
        sqlite_autoincrement=True,
    )
    for column in ("time", "account", "resource", "prunes_before"):
        op.create_index(op.f(f"ix_audit_{column}"), "audit", [column])
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in ON_SQLITE if on_sqlite else ON_POSTGRESQL:
        op.execute(statement)
    op.add_column("accounts", sa.Column("served_time", sa.Double(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("account", sa.String(), server_default="", nullable=False))
    op.execute("UPDATE jobs SET account = (SELECT owner FROM tuned_models WHERE id = jobs.tuned_model)")
    op.create_index("jobs_by_account", "jobs", ["account", "state"])


def downgrade() -> None:
    op.drop_index("jobs_by_account", "jobs")
    op.drop_column("jobs", "account")
    op.drop_column("accounts", "served_time")
    op.drop_table("audit")  # its triggers go with it
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_is_append_only()")
