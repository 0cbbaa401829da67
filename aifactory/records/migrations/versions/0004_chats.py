"""the turns of a chat beside its rendered prompt"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("completions", sa.Column("messages", sa.Text(), server_default="", nullable=False))
