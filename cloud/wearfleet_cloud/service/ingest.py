"""From MQTT into the database: batches, one transaction each, acknowledged after the commit.

At least once from the broker, exactly once in the tables: a message that comes again meets its key and is counted as
a duplicate. Whatever is wrong with one message is counted, logged and acknowledged (it would be as wrong the next
time); it never stops the others.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import sqlalchemy as sa
from wearfleet_protos.errors import ConfigError, TransportError
from wearfleet_protos.messages import DeviceStatus, Prediction
from wearfleet_protos.topics import TopicKind, subscription

from wearfleet_cloud.config import IngestConfig
from wearfleet_cloud.fleet.identity import SERVICE_NAME
from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.service.metrics import Metrics
from wearfleet_cloud.service.mqtt_session import BrokerEndpoint, Delivery, MqttSession
from wearfleet_cloud.service.telemetry import Arrival, RefusalError, add_to_batch, decode_arrival
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.telemetry_records import TelemetryBatch, TelemetryStore

__all__ = ["Ingest"]

_LOGGER: Final = logging.getLogger(__name__)
_KINDS: Final = (TopicKind.WINDOW, TopicKind.PREDICTION, TopicKind.HEALTH, TopicKind.STATUS)
_QUIET_S: Final = 0.002
_MOST_WAITING: Final = 50_000
_RETRY_S: Final = 1.0
_PRUNE_EVERY_S: Final = 600.0
_START_S: Final = 15.0


class Ingest:
    """Reads the telemetry of every device.

    Args:
        config: batching and retention.
        endpoint: the broker.
        database: where messages go.
        directory: who may send.
        metrics: counts.
        on_stored: called in the event loop with what was just stored.
    """

    def __init__(
        self,
        config: IngestConfig,
        *,
        endpoint: BrokerEndpoint,
        database: Database,
        directory: Directory,
        metrics: Metrics,
        on_stored: Callable[[Sequence[Arrival]], None],
    ) -> None:
        self._config, self._directory, self._metrics = config, directory, metrics
        self._endpoint, self._on_stored = endpoint, on_stored
        self._store = TelemetryStore(database)
        self._waiting: list[Delivery] = []
        self._arrived, self._stopping = threading.Condition(), threading.Event()
        self._boots: dict[str, str] = {}
        patterns = [subscription(kind) for kind in _KINDS]
        self._session = MqttSession(endpoint, SERVICE_NAME, patterns, self._receive, self._note_connection)
        self._writer = threading.Thread(target=self._write_batches, name="ingest-writer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pruned_at = time.monotonic()

    async def start(self) -> None:
        """Connect and begin to store.

        Raises:
            ConfigError: no broker answers; says what to do.
        """
        self._loop = asyncio.get_running_loop()
        self._writer.start()
        try:
            await asyncio.to_thread(self._session.start, _START_S)
        except TransportError as error:
            await self.stop()
            raise ConfigError(f"{error}; start the broker, or correct --broker") from error

    async def stop(self) -> None:
        """Store what has come, then disconnect."""
        self._stopping.set()
        with self._arrived:
            self._arrived.notify()
        await asyncio.to_thread(self._writer.join, 10.0)
        await asyncio.to_thread(self._session.stop)

    def _note_connection(self, connected: bool) -> None:
        self._metrics.broker_connected.set(int(connected))

    def _receive(self, delivery: Delivery) -> None:
        with self._arrived:
            if delivery.qos == 0 and len(self._waiting) >= _MOST_WAITING:
                self._metrics.rejected.labels("flood").inc()
                return
            self._waiting.append(delivery)
            if len(self._waiting) == 1:
                self._arrived.notify()

    def _write_batches(self) -> None:
        while not (self._stopping.is_set() and not self._waiting):
            deliveries = self._take()
            if deliveries and self._store_all(deliveries):
                self._session.acknowledge(deliveries)
            self._prune()

    def _take(self) -> list[Delivery]:
        """Wait for messages; go on collecting while they keep coming, for ``linger_s`` at most."""
        with self._arrived:
            if not self._waiting and not self._stopping.is_set():
                self._arrived.wait(timeout=_RETRY_S)
            if not self._waiting:
                return []
        until = time.monotonic() + self._config.linger_s
        count = 0
        while count < len(self._waiting) < self._config.max_batch and time.monotonic() < until:
            count = len(self._waiting)
            time.sleep(_QUIET_S)
        with self._arrived:
            taken = self._waiting[: self._config.max_batch]
            del self._waiting[: len(taken)]
        return taken

    def _store_all(self, deliveries: Sequence[Delivery]) -> bool:
        """True when the broker can forget the messages."""
        arrivals = [arrival for arrival in map(self._understand, deliveries) if arrival is not None]
        stored = self._commit(arrivals) if arrivals else []
        assert self._loop is not None
        if stored and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_stored, stored)
        return stored is not None

    def _understand(self, delivery: Delivery) -> Arrival | None:
        try:
            arrival = decode_arrival(delivery.topic, delivery.payload, delivery.received_ns, self._directory)
        except RefusalError as refusal:
            self._refuse(refusal.reason, str(refusal))
            return None
        return None if self._is_late_will(arrival) else arrival

    def _is_late_will(self, arrival: Arrival) -> bool:
        """True for the end of a session that a newer one has replaced."""
        message = arrival.message
        boot_id = message.header.boot_id
        if isinstance(message, DeviceStatus) and not message.online:
            return self._boots.get(arrival.device_id, boot_id) != boot_id
        if isinstance(message, DeviceStatus):
            self._boots[arrival.device_id] = boot_id
        return False

    def _commit(self, arrivals: Sequence[Arrival]) -> Sequence[Arrival] | None:
        """Store, trying again while the database is away; what the database refuses is left out.

        Returns:
            What was stored; None when the service stops before the database came back.
        """
        while True:
            try:
                self._commit_once(arrivals)
            except TransportError as error:
                _LOGGER.warning("ingest: %s", error)
                if self._stopping.wait(_RETRY_S):
                    return None
            except sa.exc.DBAPIError:
                return [arrival for arrival in arrivals if self._commit_alone(arrival)]
            else:
                return arrivals

    def _commit_alone(self, arrival: Arrival) -> bool:
        try:
            self._commit_once([arrival])
        except sa.exc.DBAPIError as error:
            self._refuse("storage", f"{arrival.device_id}: {error}")
            return False
        return True

    def _commit_once(self, arrivals: Sequence[Arrival]) -> None:
        batch = TelemetryBatch()
        for arrival in arrivals:
            add_to_batch(batch, arrival)
        with self._metrics.commit_seconds.time():
            self._metrics.duplicates.inc(self._store.store(batch))
        for kind, rows in batch.rows.items():
            self._metrics.messages.labels(kind).inc(len(rows))
        for arrival in arrivals:
            if isinstance(arrival.message, Prediction):
                self._metrics.inference_seconds.observe(arrival.message.inference_ns * 1e-9)
                self._metrics.windows_predicted.inc()
                self._metrics.windows_ood.inc(arrival.message.out_of_distribution)

    def _refuse(self, reason: str, text: str) -> None:
        self._metrics.rejected.labels(reason).inc()
        _LOGGER.warning("message refused (%s): %s", reason, text)

    def _prune(self) -> None:
        if not self._config.keep_hours or time.monotonic() - self._pruned_at < _PRUNE_EVERY_S:
            return
        self._pruned_at = time.monotonic()
        try:
            self._store.delete_before(time.time_ns() - int(self._config.keep_hours * 3600e9))
        except TransportError as error:
            _LOGGER.warning("old telemetry not deleted: %s", error)
