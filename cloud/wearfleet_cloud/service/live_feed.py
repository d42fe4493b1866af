"""From stored telemetry to the live picture: as it comes, and after a restart from the database."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.messages import DeviceStatus, Health, Prediction

from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.service.live import LiveState, RibbonCell
from wearfleet_cloud.service.telemetry import Arrival
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.device_records import health_of
from wearfleet_cloud.storage.telemetry_records import Row, recent_predictions

__all__ = ["LiveFeed", "Past", "read_past"]

_ONLINE_NS: Final = 60_000_000_000

Past = dict[str, tuple[dict[str, Any], list[Row]]]
"""By device: its newest health report and its newest predictions, oldest first."""


def read_past(database: Database, directory: Directory, limit: int) -> Past:
    """What the database holds of every active device; slow, call it in a thread."""
    past: Past = {}
    with database.read() as connection:
        for device_id, device in directory.devices.items():
            if device.revoked_ns is None:
                rows = recent_predictions(connection, device_id, limit)
                past[device_id] = dict(health_of(connection, device_id)), rows
    return past


@dataclass(frozen=True, slots=True)
class _Model:
    digest: str
    version: int
    personalised: bool


class LiveFeed:
    """Puts telemetry into the picture; used in the event loop.

    Args:
        live: the picture.
        directory: names of devices and labels of models.
    """

    def __init__(self, live: LiveState, directory: Directory) -> None:
        self._live, self._directory = live, directory

    def on_stored(self, arrivals: Sequence[Arrival]) -> None:
        """Show what was just stored."""
        for arrival in arrivals:
            device = self._directory.devices.get(arrival.device_id)
            if device is None or device.revoked_ns is not None:
                continue
            message = arrival.message
            match message:
                case Prediction():
                    self._show_prediction(arrival.device_id, device.name, message, arrival.received_ns)
                case Health():
                    self._live.on_health(
                        arrival.device_id,
                        now_ns=arrival.received_ns,
                        outbox_depth=message.outbox_depth,
                        inference_ms=message.inference_us_p50 / 1000.0,
                    )
                case DeviceStatus():
                    self._live.on_status(
                        arrival.device_id, message.online, arrival.received_ns, display_name=device.name
                    )

    def restore(self, past: Past) -> None:
        """Show what was there before a restart."""
        for device_id, (health, rows) in past.items():
            name = self._directory.devices[device_id].name
            seen_ns = self._directory.devices[device_id].last_seen_ns
            online = bool(health.get("online")) and time.time_ns() - seen_ns < _ONLINE_NS
            for row in rows:
                self._show_row(device_id, name, row)
            if health:
                self._live.on_health(
                    device_id,
                    now_ns=health["received_ns"],
                    outbox_depth=health["outbox_depth"],
                    inference_ms=health["inference_us_p50"] / 1000.0,
                )
            self._live.on_status(device_id, online, seen_ns, display_name=name)

    def _show_prediction(self, device_id: str, name: str, message: Prediction, now_ns: int) -> None:
        cell = RibbonCell(
            sequence=message.header.sequence,
            wall_time_ns=message.header.wall_time_ns,
            activity=message.label,
            confidence=min(max(float(message.probabilities[message.label]), 0.0), 1.0),
            ood_score=message.ood_score,
            out_of_distribution=message.out_of_distribution,
            boot_id=message.header.boot_id,
        )
        model = _Model(message.model_digest, message.model_version, message.personalised)
        self._show(device_id, name, cell, model, now_ns)

    def _show_row(self, device_id: str, name: str, row: Row) -> None:
        cell = RibbonCell(
            sequence=row["sequence"],
            wall_time_ns=row["wall_time_ns"],
            activity=row["label"],
            confidence=min(max(row["confidence"], 0.0), 1.0),
            ood_score=row["ood_score"],
            out_of_distribution=row["out_of_distribution"],
            boot_id=row["boot_id"],
        )
        model = _Model(row["model_digest"], row["model_version"], row["personalised"])
        self._show(device_id, name, cell, model, row["received_ns"])

    def _show(self, device_id: str, name: str, cell: RibbonCell, model: _Model, now_ns: int) -> None:
        manifest = self._directory.manifest_of(model.digest)
        if manifest is None or cell.activity >= len(manifest.contract.labels):
            return  # stored, but of a model that was never published here: its classes have no names
        try:
            self._live.on_prediction(
                device_id,
                name,
                cell,
                model.version,
                manifest.contract.labels,
                model_id=manifest.model_id,
                personalised=model.personalised,
                now_ns=now_ns,
            )
        except ProtocolError:
            return  # more kinds of activities than the page can show
