"""What the service stored of each device's stream, read from its database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from wearfleet_cloud.config import load_settings
from wearfleet_cloud.report import RibbonWindow
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.tables import predictions, streams, windows

__all__ = ["Stream", "read_streams"]


@dataclass(frozen=True, slots=True)
class Stream:
    """One device's stream as it was stored.

    Args:
        ingested: different messages of each kind, ``prediction`` and ``window``.
        counted_twice: messages stored more than once; the database's key makes this 0.
        redelivered: messages that came again and were dropped, as QoS 1 allows.
        ribbon: predictions in the order of the stream.
    """

    ingested: Mapping[str, int]
    counted_twice: int
    redelivered: int
    ribbon: tuple[RibbonWindow, ...]


def read_streams(state_dir: Path, devices: Sequence[str]) -> dict[str, Stream]:
    """The streams of some devices from a service's state folder."""
    state = open_state(load_settings(None, {"service": {"state_dir": state_dir}}))
    try:
        with state.database.read() as connection:
            return {device: _stream(connection, device) for device in devices}
    finally:
        state.database.close()


def _stream(connection: sa.Connection, device: str) -> Stream:
    ingested, twice = {}, 0
    for kind, table in (("prediction", predictions), ("window", windows)):
        rows, different = _counts(connection, device, table)
        ingested[kind] = different
        twice += rows - different
    again = sa.select(sa.func.coalesce(sa.func.sum(streams.c.duplicated), 0)).where(
        streams.c.device_id == device
    )
    columns = (predictions.c.label, predictions.c.annotated_label, predictions.c.out_of_distribution)
    query = (
        sa.select(*columns)
        .join(streams, streams.c.stream_id == predictions.c.stream_id)
        .where(streams.c.device_id == device)
        .order_by(streams.c.stream_id, predictions.c.sequence)
    )
    return Stream(
        ingested=ingested,
        counted_twice=twice,
        redelivered=int(connection.execute(again).scalar_one()),
        ribbon=tuple(RibbonWindow(*row) for row in connection.execute(query)),
    )


def _counts(connection: sa.Connection, device: str, table: sa.Table) -> tuple[int, int]:
    """Stored rows, and different (boot, sequence) among them."""
    joined = (
        sa.select(streams.c.boot_id, table.c.sequence)
        .join(streams, streams.c.stream_id == table.c.stream_id)
        .where(streams.c.device_id == device)
    )
    rows = sa.select(sa.func.count()).select_from(joined.subquery())
    different = sa.select(sa.func.count()).select_from(joined.distinct().subquery())
    return int(connection.execute(rows).scalar_one()), int(connection.execute(different).scalar_one())
