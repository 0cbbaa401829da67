"""API keys, what they may use and have used; files and batch jobs have owners"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    for table in ("files", "batch_jobs"):
        op.add_column(table, sa.Column("key_id", sa.String(64), server_default="anonymous", nullable=False))
        op.add_column(table, sa.Column("team", sa.String(64)))
    op.create_table(
        "api_keys",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("team", sa.String(64)),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float()),
        sa.Column("revoked_at", sa.Float()),
        sa.PrimaryKeyConstraint("factory", "id"),
    )
    op.create_table(
        "api_key_secrets",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("ends_at", sa.Float()),
        sa.PrimaryKeyConstraint("factory", "key_id", "number"),
        sa.ForeignKeyConstraint(["factory", "key_id"], ["api_keys.factory", "api_keys.id"]),
    )
    op.create_table(
        "limits",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("requests_per_minute", sa.BigInteger()),
        sa.Column("tokens_per_minute", sa.BigInteger()),
        sa.Column("concurrent", sa.Integer()),
        sa.Column("budget_tokens", sa.BigInteger()),
        sa.Column("budget_money", sa.Float()),
        sa.Column("budget_joules", sa.Float()),
        sa.Column("budget_window", sa.String(8), nullable=False),
        sa.PrimaryKeyConstraint("factory", "kind", "name"),
    )
    op.create_table(
        "request_rates",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("factory", "kind", "name", "slot"),
    )
    op.create_table(
        "open_requests",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("team", sa.String(64)),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("rated", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("money", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("factory", "id"),
    )
    op.create_index("open_requests_by_key", "open_requests", ["factory", "key_id"])
    op.create_index("open_requests_by_team", "open_requests", ["factory", "team"])
    op.create_table(
        "spending",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("answer_tokens", sa.BigInteger(), nullable=False),
        sa.Column("money", sa.Float(), nullable=False),
        sa.Column("joules", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("factory", "kind", "name", "day"),
    )
