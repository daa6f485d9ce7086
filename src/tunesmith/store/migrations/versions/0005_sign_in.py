"""Sign-in: OAuth clients and what they were allowed, browsers, devices, service accounts, signing keys"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NEW = (
    "signing_keys",
    "service_account_keys",
    "attempts",
    "browser_sessions",
    "device_codes",
    "authorization_codes",
    "authorizations",
    "oauth_clients",
)


def upgrade() -> None:
    op.add_column("accounts", sa.Column("service", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_table(
        "oauth_clients",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("secret_hash", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "authorizations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("client", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("refresh_hash", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("use_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("refresh_hash"),
    )
    op.create_index(op.f("ix_authorizations_account"), "authorizations", ["account"])
    op.create_index(op.f("ix_authorizations_client"), "authorizations", ["client"])
    op.create_table(
        "authorization_codes",
        sa.Column("code_hash", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("client", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("redirect_uri", sa.String(), nullable=False),
        sa.Column("code_challenge", sa.String(), nullable=False),
        sa.Column("nonce", sa.String(), nullable=True),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.Column("used", sa.Boolean(), nullable=False),
        sa.Column("authorization", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("code_hash"),
    )
    op.create_index(op.f("ix_authorization_codes_expire_time"), "authorization_codes", ["expire_time"])
    op.create_table(
        "device_codes",
        sa.Column("code_hash", sa.String(), nullable=False),
        sa.Column("user_code", sa.String(), nullable=False),
        sa.Column("client", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=True),
        sa.Column("approved", sa.Boolean(), nullable=False),
        sa.Column("poll_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("code_hash"),
        sa.UniqueConstraint("user_code"),
    )
    op.create_index(op.f("ix_device_codes_expire_time"), "device_codes", ["expire_time"])
    op.create_table(
        "browser_sessions",
        sa.Column("cookie_hash", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("expire_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("cookie_hash"),
    )
    op.create_index(op.f("ix_browser_sessions_account"), "browser_sessions", ["account"])
    op.create_index(op.f("ix_browser_sessions_expire_time"), "browser_sessions", ["expire_time"])
    op.create_table(
        "attempts",
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("start_time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("subject"),
    )
    op.create_index(op.f("ix_attempts_start_time"), "attempts", ["start_time"])
    op.create_table(
        "service_account_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("public_key", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.email"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_service_account_keys_account"), "service_account_keys", ["account"])
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("private_key", sa.String(), nullable=False),
        sa.Column("create_time", sa.Double(), nullable=False),
        sa.Column("retire_time", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("access_tokens") as tokens:
        tokens.add_column(sa.Column("authorization", sa.String(), nullable=True))
        tokens.create_foreign_key(
            "access_tokens_authorization_fkey",
            "authorizations",
            ["authorization"],
            ["id"],
            ondelete="CASCADE",
        )
    op.create_index(op.f("ix_access_tokens_authorization"), "access_tokens", ["authorization"])
    op.create_index(op.f("ix_access_tokens_expire_time"), "access_tokens", ["expire_time"])


def downgrade() -> None:
    op.drop_index(op.f("ix_access_tokens_expire_time"), "access_tokens")
    op.drop_index(op.f("ix_access_tokens_authorization"), "access_tokens")
    with op.batch_alter_table("access_tokens") as tokens:  # SQLite drops no column that refers to another
        tokens.drop_column("authorization")
    for table in NEW:
        op.drop_table(table)
    op.drop_column("accounts", "service")
