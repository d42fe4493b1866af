"""Telemetry in the database: many messages in one transaction, each counted once.

The key (stream, sequence) makes a message that comes twice a counted duplicate. A stream is one start of one agent
and one kind of message.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from wearfleet_cloud.storage.database import Database, insert_or_skip
from wearfleet_cloud.storage.tables import device_health, devices, predictions, streams, windows

__all__ = ["Row", "StreamKey", "TelemetryBatch", "TelemetryStore", "recent_predictions"]

StreamKey = tuple[str, str, str]
"""Device, boot and kind of message."""

Row = dict[str, Any]

_TABLES: Final[Mapping[str, sa.Table]] = {"window": windows, "prediction": predictions}
_MAX_CACHED_STREAMS: Final = 100_000


@dataclass(slots=True)
class TelemetryBatch:
    """What one transaction stores.

    Args:
        rows: by kind, pairs of stream and column values (without the stream's number).
        health: newest values by device.
        seen_ns: time of the newest message by device.
    """

    rows: dict[str, list[tuple[StreamKey, Row]]] = field(
        default_factory=lambda: {kind: [] for kind in _TABLES}
    )
    health: dict[str, Row] = field(default_factory=dict)
    seen_ns: dict[str, int] = field(default_factory=dict)


class TelemetryStore:
    """Writes batches; used by one thread.

    Args:
        database: where to.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._stream_ids: dict[StreamKey, int] = {}

    def store(self, batch: TelemetryBatch) -> int:
        """Write a batch in one transaction.

        Returns:
            How many messages had come before.

        Raises:
            TransportError: the database is busy or away; nothing was stored.
        """
        with self._database.write() as connection:
            keys = {key for rows in batch.rows.values() for key, _ in rows}
            ids = self._streams_of(connection, keys)
            duplicates = sum(
                _insert(connection, _TABLES[kind], rows, ids) for kind, rows in batch.rows.items() if rows
            )
            _note_health(connection, batch.health)
            if batch.seen_ns:
                seen = [{"device": name, "at": at} for name, at in batch.seen_ns.items()]
                connection.execute(_SEEN, seen)
        if len(self._stream_ids) > _MAX_CACHED_STREAMS:
            self._stream_ids.clear()
        self._stream_ids.update(ids)  # after the commit, so that a rolled back stream is not remembered
        return duplicates

    def delete_before(self, received_ns: int) -> int:
        """Delete windows and predictions that came before a time; the counts of their streams stay."""
        with self._database.write() as connection:
            return sum(
                connection.execute(sa.delete(table).where(table.c.received_ns < received_ns)).rowcount
                for table in _TABLES.values()
            )

    def _streams_of(self, connection: Connection, keys: set[StreamKey]) -> dict[StreamKey, int]:
        ids = {key: self._stream_ids[key] for key in keys if key in self._stream_ids}
        for key in sorted(keys - ids.keys()):
            values = dict(zip(("device_id", "boot_id", "kind"), key, strict=True))
            insert_or_skip(connection, streams, values)
            query = sa.select(streams.c.stream_id).filter_by(**values)
            ids[key] = int(connection.execute(query).scalar_one())
        return ids


def recent_predictions(connection: Connection, device_id: str, limit: int) -> list[Row]:
    """The newest predictions of a device, oldest first, with the boot id of their stream."""
    query = (
        sa.select(predictions, streams.c.boot_id)
        .join(streams, streams.c.stream_id == predictions.c.stream_id)
        .where(streams.c.device_id == device_id)
        .order_by(predictions.c.received_ns.desc(), predictions.c.sequence.desc())
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(query).mappings()][::-1]


def _insert(
    connection: Connection, table: sa.Table, rows: list[tuple[StreamKey, Row]], ids: Mapping[StreamKey, int]
) -> int:
    """Insert what is new; the number of duplicates."""
    values = [row | {"stream_id": ids[key]} for key, row in rows]
    attempt = connection.begin_nested()
    if insert_or_skip(connection, table, values) == len(values):
        attempt.commit()
        fresh = Counter(row["stream_id"] for row in values)
    else:  # rare: something came twice; count it for its stream
        attempt.rollback()
        fresh = _insert_by_stream(connection, table, values)
    _count(connection, values, fresh)
    return len(values) - sum(fresh.values())


def _insert_by_stream(connection: Connection, table: sa.Table, values: Sequence[Row]) -> Counter[int]:
    fresh: Counter[int] = Counter()
    for stream_id in sorted({row["stream_id"] for row in values}):
        mine = [row for row in values if row["stream_id"] == stream_id]
        fresh[stream_id] = insert_or_skip(connection, table, mine)
    return fresh


def _count(connection: Connection, values: Sequence[Row], fresh: Counter[int]) -> None:
    total = Counter(row["stream_id"] for row in values)
    highest: dict[int, int] = {}
    for row in values:
        highest[row["stream_id"]] = max(row["sequence"], highest.get(row["stream_id"], -1))
    connection.execute(
        _COUNT,
        [
            {
                "id": stream,
                "fresh": fresh[stream],
                "again": total[stream] - fresh[stream],
                "high": highest[stream],
            }
            for stream in sorted(total)
        ],
    )


def _note_health(connection: Connection, health: Mapping[str, Row]) -> None:
    for device_id, row in health.items():
        update = sa.update(device_health).where(device_health.c.device_id == device_id).values(**row)
        if connection.execute(update).rowcount == 0:
            connection.execute(sa.insert(device_health), row | {"device_id": device_id})


_SEEN: Final = (
    sa.update(devices)
    .where(devices.c.device_id == sa.bindparam("device"), devices.c.last_seen_ns < sa.bindparam("at"))
    .values(last_seen_ns=sa.bindparam("at"))
)
_COUNT: Final = (
    sa.update(streams)
    .where(streams.c.stream_id == sa.bindparam("id"))
    .values(
        received=streams.c.received + sa.bindparam("fresh"),
        duplicated=streams.c.duplicated + sa.bindparam("again"),
        highest_sequence=sa.case(
            (streams.c.highest_sequence < sa.bindparam("high"), sa.bindparam("high")),
            else_=streams.c.highest_sequence,
        ),
    )
)
