"""releases on trial beside production: who is tried, what shadows answered, and what came of it"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_sequence = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "trials",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("share", sa.Float(), nullable=False),
        sa.Column("by", sa.String(length=16), nullable=False),
        sa.Column("begun", sa.Integer(), nullable=False),
        sa.Column("quarantined", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("factory", "number"),
        sa.ForeignKeyConstraint(["factory", "release"], ["releases.factory", "releases.number"]),
    )
    op.create_table(
        "shadow_answers",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("completion", sa.String(length=64), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.String(length=16), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("answer_tokens", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("factory", "completion", "release"),
        sa.ForeignKeyConstraint(
            ["factory", "completion"], ["completions.factory", "completions.id"], ondelete="CASCADE", onupdate="CASCADE"
        ),
    )
    op.create_table(
        "outcomes",
        sa.Column("seq", _sequence, autoincrement=True, nullable=False),
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("trial", sa.Integer(), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("first_s", sa.Float(), nullable=True),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("outcomes_by_trial", "outcomes", ["factory", "trial", "seq"])
