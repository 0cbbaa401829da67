"""what a judge says of answers that were given"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "verdicts",
        sa.Column("factory", sa.String(64), nullable=False),
        sa.Column("completion", sa.String(64), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("judge", sa.String(64), nullable=False),
        sa.Column("bad", sa.Integer()),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("factory", "completion"),
        sa.ForeignKeyConstraint(
            ["factory", "completion"], ["completions.factory", "completions.id"], ondelete="CASCADE", onupdate="CASCADE"
        ),
    )
    op.create_index("verdicts_by_release", "verdicts", ["factory", "release"])
    op.create_index("verdicts_by_time", "verdicts", ["factory", "at"])
