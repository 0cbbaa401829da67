"""each line of the audit holds the hash of the one before it"""

import sqlalchemy as sa
from alembic import op

from aifactory.records.audit import chain_old_lines
from aifactory.records.database import now

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("audit", sa.Column("number", sa.Integer(), server_default="0", nullable=False))
    op.add_column("audit", sa.Column("previous", sa.String(length=64), server_default="", nullable=False))
    op.add_column("audit", sa.Column("hash", sa.String(length=64), server_default="", nullable=False))
    chain_old_lines(op.get_bind(), at=now())
    op.create_index("audit_number", "audit", ["factory", "number"], unique=True)
