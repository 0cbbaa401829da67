"""what was erased because somebody asked to be forgotten: tombstones without text, and releases that were withdrawn"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("releases", sa.Column("withdrawn", sa.String(length=64), nullable=True))
    op.create_table(
        "erasures",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("where_hash", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("found", sa.Text(), nullable=False),
        sa.Column("begun_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("factory", "id"),
    )
    op.create_table(
        "tombstones",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("erasure", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("factory", "hash"),
    )
    op.create_index("tombstones_by_erasure", "tombstones", ["factory", "erasure"])
    op.create_table(
        "erasure_keys",
        sa.Column("factory", sa.String(length=64), nullable=False),
        sa.Column("secret", sa.String(length=64), nullable=False),
        sa.Column("made_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("factory"),
    )
