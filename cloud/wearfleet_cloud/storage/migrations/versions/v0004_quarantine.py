"""Devices that stream on and take part in no federated round, and why."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Nobody is in quarantine so far."""
    op.add_column("devices", sa.Column("quarantined_ns", sa.BigInteger(), nullable=True))
    op.add_column(
        "devices",
        sa.Column("quarantine_reason", sa.String(length=500), nullable=False, server_default=""),
    )
