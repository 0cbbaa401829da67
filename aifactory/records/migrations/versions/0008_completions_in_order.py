"""completions of a release are found in the order in which they were given"""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_index("completions_in_order", "completions", ["factory", "release", "at", "id"])
