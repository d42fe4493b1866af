"""What each entry of the ledger of privacy protects: a client, or a record of its wearer."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Entries so far are of clients."""
    op.add_column(
        "privacy_spends",
        sa.Column("unit", sa.String(length=16), nullable=False, server_default="client"),
    )
