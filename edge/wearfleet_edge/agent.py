"""The composition root: puts the parts together, runs them in threads, stops them in order.

Threads: stream, mqtt, heartbeat, federation; the calling thread writes ``status.json`` and health messages.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import ConfigError, WearfleetError
from wearfleet_protos.messages import ClockQuality

from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.federated import Device, FederatedWorker
from wearfleet_edge.heartbeat import Heartbeat, renew_if_due
from wearfleet_edge.identity import (
    Broker,
    Enrolment,
    load_enrolment,
    require_valid_certificate,
    secure_identity,
)
from wearfleet_edge.local_state import LocalState
from wearfleet_edge.memory import release_memory, resident_bytes
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.outbox import Outbox
from wearfleet_edge.own_windows import OwnWindows
from wearfleet_edge.pipeline import HeaderFactory
from wearfleet_edge.policy import plan_demands, sharing_policy
from wearfleet_edge.scores import Scores
from wearfleet_edge.sensors.replay import load_replay
from wearfleet_edge.slots import Slots
from wearfleet_edge.state import lock_directory, write_json
from wearfleet_edge.status import StatusSource, health_entry, make_status
from wearfleet_edge.streaming import Streamer
from wearfleet_edge.trainer import Limits
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.mqtt import MqttLink, Session, device_tls
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_edge.update import Updater
from wearfleet_edge.wearer import Wearer

if TYPE_CHECKING:
    from wearfleet_edge.config import AgentConfig
    from wearfleet_edge.secagg_client import Member
    from wearfleet_edge.state import StateDirectory

__all__ = ["Agent", "AgentOptions"]

_LOG = logging.getLogger(__name__)

_STATUS_SECONDS: Final = 1.0
_RENEWAL_CHECK_SECONDS: Final = 3600.0
_RELEASE_ABOVE_BYTES: Final = 80_000_000
"""Connecting and starting leave code in memory that is not run again; above this it is given back."""
_SHORTEST_DELAY_SECONDS: Final = 0.02
"""Whatever a service answers, it is not asked more often."""
_AGENT_VERSION: Final = version("wearfleet")


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How to run.

    Args:
        state: the agent's directory.
        config: settings.
        once: end when the recording was streamed and everything was acknowledged; learn nothing.
    """

    state: StateDirectory
    config: AgentConfig
    once: bool = False


class Agent:
    """One device.

    Args:
        options: how to run.

    Raises:
        NotFoundError: the directory is not enrolled.
        ConflictError: another agent runs with this directory.
        ConfigError: the certificate's dates or a setting are wrong.
        DataError: the recording or the outbox cannot be read.
    """

    def __init__(self, options: AgentOptions) -> None:
        self._options = options
        state, config = options.state, options.config
        enrolment = load_enrolment(state)
        state.create()
        self._lock = lock_directory(state)
        require_valid_certificate(state, datetime.now(UTC))
        self._state = state
        self._device_id = enrolment.device_id
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._begin = time.monotonic()
        boot = os.urandom(8).hex()
        self._headers = HeaderFactory(
            enrolment.device_id, boot, ClockQuality.REPLAY, time.time_ns, lambda: os.urandom(16).hex()
        )
        self._backoff = Backoff(0.5, 60.0, SystemRandom().random)
        self._wearer = _load_wearer(config)
        self._outbox = self._make_outbox(boot)
        self._active = ActiveModel()
        self._local = LocalState(state)
        self._cloud = RpcCloud.of_device(state, enrolment, options.config.federation.device_class)
        self._scores = Scores(self._active, self._wearer)
        self._streamer = self._make_streamer()
        self._link = self._make_link(enrolment)
        self._slots = Slots(state.models, enrolment.signing_keys)
        self._updater = Updater(self._artifacts("models"), self._slots, self._active, enrolment.signing_keys)
        self._heartbeat = Heartbeat(
            cloud=self._cloud,
            updater=self._updater,
            active=self._active,
            agent_version=_AGENT_VERSION,
            wall_ns=time.time_ns,
        )
        self._plan_artifacts = self._artifacts("plans")
        self._worker = self._make_worker(enrolment)

    def run(self) -> dict[str, object]:
        """Run until a signal, or until the recording is done with ``once``.

        Returns:
            The last status.

        Raises:
            WearfleetError: a part of the agent cannot go on.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        release_memory()
        self._load_installed()
        self._link.start()
        threads = [self._thread("heartbeat", self._heartbeat_loop)]
        if self._wearer.has_recordings:
            threads.append(self._thread("stream", self._stream_loop))
        if self._options.config.federation.enabled and not self._options.once:
            threads.append(self._thread("federation", self._federation_loop))
        try:
            self._watch()
        finally:
            self._shut_down(threads)
        status = self._write_status(running=False)
        self._outbox.close()
        self._lock.close()
        if self._failure is not None:
            raise self._failure
        return status

    def _make_outbox(self, boot: str) -> Outbox:
        limits = self._options.config.outbox
        return Outbox(
            self._state.outbox,
            boot=boot,
            clock_ns=time.time_ns,
            max_messages=limits.max_messages,
            max_bytes=limits.max_bytes,
        )

    def _make_streamer(self) -> Streamer:
        return Streamer(
            wearer=self._wearer,
            active=self._active,
            outbox=self._outbox,
            headers=self._headers,
            policy=sharing_policy(self._options.config.policy),
            sensor=self._options.config.sensor,
            wait=self._stop.wait,
        )

    def _make_worker(self, enrolment: Enrolment) -> FederatedWorker:
        return FederatedWorker(
            cloud=self._cloud,
            artifacts=self._plan_artifacts,
            local=self._local,
            active=self._active,
            device=self._make_device(enrolment),
            backoff=self._backoff,
        )

    def _watch(self) -> None:
        """Write status and health until it is time to stop."""
        next_health = 0.0
        while not self._stop.is_set():
            if time.monotonic() >= next_health:
                self._outbox.append([health_entry(self._source(), self._headers)])
                next_health = time.monotonic() + self._options.config.health_seconds
                if resident_bytes() > _RELEASE_ABOVE_BYTES:
                    release_memory()
            self._write_status(running=True)
            finished = self._streamer.statistics.finished
            if self._options.once and finished and self._outbox.wait_below(1, _STATUS_SECONDS):
                return
            self._stop.wait(_STATUS_SECONDS)

    def _shut_down(self, threads: list[threading.Thread]) -> None:
        self._stop.set()
        self._cloud.close()
        for thread in threads:
            thread.join(5.0)
        self._outbox.append([health_entry(self._source(), self._headers)])
        if self._link.connected:
            self._outbox.wait_below(1, self._options.config.outbox.drain_seconds)
        self._link.stop()

    def _stream_loop(self) -> None:
        while not self._active.wait(0.5):
            if self._stop.is_set():
                return
        self._streamer.run()

    def _heartbeat_loop(self) -> None:
        next_renewal = 0.0

        def step() -> float:
            nonlocal next_renewal
            if time.monotonic() >= next_renewal:
                next_renewal = (
                    time.monotonic() + _RENEWAL_CHECK_SECONDS
                )  # a failure must not hold up heartbeats
                if renew_if_due(self._cloud, self._state, self._device_id, datetime.now(UTC)):
                    self._cloud.reopen()
            return self._heartbeat.step()

        self._repeat("heartbeat", step)

    def _federation_loop(self) -> None:
        self._repeat("federation", self._worker.step)

    def _repeat(self, what: str, step: Callable[[], float]) -> None:
        """Call ``step`` until the agent stops; after an error wait longer each time."""
        failures = 0
        while not self._stop.is_set():
            try:
                delay = step()
                failures = 0
            except WearfleetError as error:
                if self._stop.is_set():
                    return
                failures += 1
                delay = self._backoff.delay(failures)
                _LOG.warning("%s: %s; next try in %.1f s", what, error, delay)
            self._stop.wait(max(delay, _SHORTEST_DELAY_SECONDS))

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except Exception as error:  # noqa: BLE001  no thread may end in silence; run() raises it
                self._failure = error
                self._stop.set()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _load_installed(self) -> None:
        """Use the model from disk, so that recognition starts without a network."""
        try:
            installed = self._slots.current()
            if installed is not None:
                self._active.use(installed, self._local.personal(installed.manifest_digest))
        except WearfleetError as error:
            _LOG.error("the installed model cannot be used: %s; fetching it again", error)

    def _source(self) -> StatusSource:
        return StatusSource(
            device_id=self._device_id,
            agent_version=_AGENT_VERSION,
            boot_id=self._headers.boot_id,
            uptime_s=time.monotonic() - self._begin,
            active=self._active,
            outbox=self._outbox,
            stream=self._streamer.statistics,
            link=self._link,
            federation=self._worker.progress,
            bytes_down=self._plan_artifacts.bytes_received,
            scores=self._scores,
            refusal=self._updater.refusal,
            clock_error_s=self._heartbeat.clock_error_s,
        )

    def _write_status(self, *, running: bool) -> dict[str, object]:
        status = make_status(self._source(), running=running)
        write_json(self._state.status, status, durable=False)
        return status

    def _artifacts(self, name: str) -> ArtifactStore:
        return ArtifactStore(self._state.artifacts / name, self._cloud, self._backoff, self._stop.wait)

    def _make_link(self, enrolment: Enrolment) -> MqttLink:
        config, state = self._options.config.broker, self._state
        broker = Broker(config.host, config.port, config.tls) if config.host else enrolment.broker
        session = Session(
            tenant=enrolment.tenant,
            device_id=enrolment.device_id,
            broker=broker,
            tls=lambda: device_tls(state.authority, state.certificate, state.key),
            agent_version=_AGENT_VERSION,
        )
        return MqttLink(session, self._outbox, self._headers, self._backoff)

    def _make_device(self, enrolment: Enrolment) -> Device:
        config = self._options.config.federation
        return Device(
            keys=enrolment.signing_keys,
            trainer=OwnWindows(self._wearer.training_data, self._scores.base),
            limits=lambda remaining: Limits(
                seconds=min(config.max_seconds, remaining),
                memory_bytes=config.max_memory_mb * 1e6,
                resident_bytes=resident_bytes,
                monotonic=time.monotonic,
                stopped=self._stop.is_set,
            ),
            max_bytes=config.max_megabytes * 1e6,
            poll_seconds=config.poll_seconds,
            wait=self._stop.wait,
            member=lambda: self._member(config.secure_minimum_cohort),
            secure_only=config.secure_only,
            demands=plan_demands(config),
            max_lora_rank=config.max_lora_rank,
        )

    def _member(self, minimum_cohort: int) -> Member:
        from wearfleet_edge.secagg_client import Member  # noqa: PLC0415  slow to import, not always needed

        return Member(self._device_id, *secure_identity(self._state), minimum_cohort)


def _load_wearer(config: AgentConfig) -> Wearer:
    if not config.sensor.recording:
        return Wearer((), (), config.federation.holdout_fraction)
    path = Path(config.sensor.recording)
    if not path.exists():
        raise ConfigError(f"sensor.recording {path} does not exist")
    return Wearer(*load_replay(path), config.federation.holdout_fraction)
