"""The service: everything is put together here, and nowhere else."""

import asyncio
import contextlib
import datetime as dt
import logging
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from wearfleet_protos.errors import ConfigError, WearfleetError

from wearfleet_cloud.config import Settings
from wearfleet_cloud.fleet.identity import ServerFiles
from wearfleet_cloud.service.broker import Broker, create_broker
from wearfleet_cloud.service.chunk_cache import ChunkCache
from wearfleet_cloud.service.coordinator import Coordinator, FederationParts
from wearfleet_cloud.service.enrolment import Enrolment
from wearfleet_cloud.service.federation import Federation
from wearfleet_cloud.service.handlers import Artifacts, Fleet
from wearfleet_cloud.service.ingest import Ingest
from wearfleet_cloud.service.live import LiveState
from wearfleet_cloud.service.live_feed import LiveFeed, read_past
from wearfleet_cloud.service.memory import freeze_startup, keep_freed_memory
from wearfleet_cloud.service.metrics import Metrics
from wearfleet_cloud.service.rpc import RpcParts, RpcServer
from wearfleet_cloud.service.rpc_guard import Guard
from wearfleet_cloud.service.secure_rounds import device_verifier
from wearfleet_cloud.service.state import State, open_state
from wearfleet_cloud.service.state_dir import BrokerPlace, RunningService, exclusive, write_running
from wearfleet_cloud.service.updates import UpdateStore
from wearfleet_cloud.service.web_server import WebServer

__all__ = ["Service", "serve"]

_LOGGER: Final = logging.getLogger(__name__)
_WATCH_S: Final = 0.5
_GRACE_S: Final = 10.0
_STOP_S: Final = 30.0
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


class Service:
    """One service on one state folder. ``start`` it, read ``running``, ``stop`` it.

    Args:
        settings: all settings.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.live = LiveState(settings.service.source_name, simulated=settings.service.simulated)
        self.metrics = Metrics()
        self.running: RunningService | None = None
        self._healthy = False
        self._stack = AsyncExitStack()

    async def start(self) -> RunningService:
        """Start every part; what was started is stopped again when a later one fails.

        Raises:
            ConfigError: a port is in use, no broker answers, another service runs on the folder, and so on.
        """
        try:
            self.running = await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self.running

    async def stop(self) -> None:
        """Tell load balancers, let calls finish, store what has come, close."""
        self._healthy = False
        try:
            await asyncio.wait_for(self._stack.aclose(), _STOP_S)
        except TimeoutError:
            _LOGGER.error("the service did not stop within %g s", _STOP_S)  # noqa: TRY400 - says it all

    async def _start(self) -> RunningService:
        service = self.settings.service
        if service.public_host in _EVERYWHERE:
            raise ConfigError("set service.public_host: devices cannot connect to 'every address'")
        self._stack.enter_context(exclusive(service.state_dir))
        state = await asyncio.to_thread(open_state, self.settings)
        self._stack.callback(state.database.close)
        files = state.authority.server_files((service.host, service.public_host), dt.datetime.now(dt.UTC))
        await asyncio.to_thread(state.directory.refresh)
        web = WebServer(
            self.live, self.metrics, lambda: self._healthy, host=service.host, port=service.web_port
        )
        await web.start()
        self._stack.push_async_callback(web.stop)
        broker = create_broker(self.settings.broker, service.state_dir / "broker", service.host, files)
        broker.revoke(state.directory.revoked)
        await broker.start()
        self._stack.push_async_callback(broker.stop)
        await self._start_ingest(state, broker)
        rpc, coordinator = self._build_calls(state, files)
        running = await rpc.start(partial(self._describe, broker, web))
        self._stack.push_async_callback(rpc.stop, _GRACE_S)
        await coordinator.refresh()
        self._stack.push_async_callback(coordinator.stop)
        self._stack.push_async_callback(rpc.refuse_new)
        broker.admit_devices()
        self._watch(state, broker, coordinator)
        write_running(service.state_dir, running)
        self._healthy = True
        return running

    async def _start_ingest(self, state: State, broker: Broker) -> None:
        feed = LiveFeed(self.live, state.directory)
        past = await asyncio.to_thread(read_past, state.database, state.directory, self.live.ribbon_length)
        feed.restore(past)
        ingest = Ingest(
            self.settings.ingest,
            endpoint=broker.endpoint,
            database=state.database,
            directory=state.directory,
            metrics=self.metrics,
            on_stored=feed.on_stored,
        )
        await ingest.start()
        self._stack.push_async_callback(ingest.stop)

    def _build_calls(self, state: State, files: ServerFiles) -> tuple[RpcServer, Coordinator]:
        service = self.settings.service
        chunks = ChunkCache(state.blobs)
        updates = UpdateStore(service.state_dir / "updates", self.settings.federation.max_update_bytes)
        parts = FederationParts(
            config=self.settings.federation,
            database=state.database,
            blobs=state.blobs,
            keys=state.keys,
            updates=updates,
            directory=state.directory,
            live=self.live,
            metrics=self.metrics,
            verifier=device_verifier(state.authority),
            on_tensors=chunks.add,
        )
        coordinator = Coordinator(parts)
        federation = Federation(parts, coordinator)
        calls = RpcParts(
            guard=Guard(state.directory, self.metrics),
            enrolment=Enrolment(state.database, state.authority, state.directory),
            artifacts=Artifacts(state.blobs, chunks, updates, federation),
            federation=federation,
            fleet=Fleet(state.database, state.directory),
            keys=state.keys,
        )
        rpc = RpcServer(calls, files, host=service.host, port=service.port, enrol_port=service.enrol_port)
        return rpc, coordinator

    def _describe(self, broker: Broker, web: WebServer, port: int, enrol_port: int) -> RunningService:
        public, endpoint = self.settings.service.public_host, broker.endpoint
        host = endpoint.host if self.settings.broker.kind == "external" else public
        place = BrokerPlace(host, endpoint.port, endpoint.tls is not None)
        return RunningService(os.getpid(), public, port, enrol_port, web.port, place)

    def _watch(self, state: State, broker: Broker, coordinator: Coordinator) -> None:
        """Notice what commands change in the database."""
        task = asyncio.create_task(self._keep_watching(state, broker, coordinator))

        async def end() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self._stack.push_async_callback(end)

    async def _keep_watching(self, state: State, broker: Broker, coordinator: Coordinator) -> None:
        while True:
            directory = state.directory
            self.metrics.devices.set(len(directory.devices) - len(directory.revoked))
            await asyncio.sleep(_WATCH_S)
            try:
                if await asyncio.to_thread(directory.refresh):
                    broker.revoke(directory.revoked)
                    for device_id in directory.revoked:
                        self.live.on_removed(device_id)
                    await coordinator.refresh()
                await coordinator.give_up_lost()
            except WearfleetError as error:
                _LOGGER.warning("changes not read: %s", error)


async def serve(settings: Settings, on_ready: Callable[[RunningService], None]) -> None:
    """Run a service until SIGTERM or SIGINT.

    Args:
        settings: all settings.
        on_ready: called once everything listens.

    Raises:
        ConfigError: it cannot start; says what to do.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keep_freed_memory()
    service = Service(settings)
    starting = asyncio.create_task(service.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return
    running = await starting
    freeze_startup()
    on_ready(running)
    await stopping
    await service.stop()
