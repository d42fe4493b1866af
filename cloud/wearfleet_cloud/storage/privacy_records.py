"""Queries about the ledger of privacy."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from wearfleet_cloud.federated.privacy.accounting import Spend
from wearfleet_cloud.federated.privacy.ledger import Ledger
from wearfleet_cloud.storage.database import insert_or_skip
from wearfleet_cloud.storage.tables import privacy_spends

__all__ = ["read_ledger", "write_spends"]


def write_spends(
    connection: Connection, place: tuple[str, int], devices: Collection[str], cost: Spend, now_ns: int
) -> None:
    """Make the entries of a round exactly those of ``devices``; those that are there stay as they are.

    Args:
        connection: of the transaction that stores the round's state.
        place: run and round.
        devices: ids.
        cost: of the round for each of them.
        now_ns: present time.
    """
    run_id, number = place
    table = privacy_spends
    of_round = (table.c.run_id == run_id) & (table.c.round == number)
    connection.execute(sa.delete(table).where(of_round, table.c.device_id.not_in(sorted(devices))))
    if devices:
        common = {
            "run_id": run_id,
            "round": number,
            "noise_multiplier": cost.noise_multiplier,
            "sampling_rate": cost.sampling_rate,
            "count": cost.count,
            "unit": cost.unit,
            "entered_ns": now_ns,
        }
        insert_or_skip(connection, table, [{**common, "device_id": device} for device in sorted(devices)])


def read_ledger(connection: Connection, device_id: str | None = None) -> Ledger:
    """All entries, or those of one device."""
    query = sa.select(privacy_spends)
    if device_id is not None:
        query = query.where(privacy_spends.c.device_id == device_id)
    entries: dict[str, dict[tuple[str, int], Spend]] = {}
    for row in connection.execute(query).mappings():
        own = entries.setdefault(row["device_id"], {})
        own[row["run_id"], row["round"]] = Spend(
            row["noise_multiplier"], row["sampling_rate"], row["count"], row["unit"]
        )
    return Ledger(entries)
