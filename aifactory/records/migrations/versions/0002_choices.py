"""choices between answers"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "choices",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("feedback", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("rejected", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["factory", "rejected"],
            ["completions.factory", "completions.id"],
        ),
        sa.PrimaryKeyConstraint("factory", "feedback", "rejected"),
    )
