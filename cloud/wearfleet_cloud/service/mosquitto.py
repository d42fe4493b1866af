"""Mosquitto as a child of the service: started, watched, taken over after a crash, told of revocations."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.config import BrokerConfig
from wearfleet_cloud.fleet.identity import ServerFiles
from wearfleet_cloud.fleet.private_files import write_private
from wearfleet_cloud.service.broker import client_context, free_port
from wearfleet_cloud.service.mosquitto_files import access_list, configuration
from wearfleet_cloud.service.mqtt_session import BrokerEndpoint

__all__ = ["MosquittoBroker"]

_LOGGER: Final = logging.getLogger(__name__)
_START_S: Final = 10.0
_STOP_S: Final = 10.0
_LONGEST_RETRY_S: Final = 30.0


class MosquittoBroker:
    """Mosquitto as a child process in a session of its own, so that Ctrl-C reaches it through us.

    If the service is killed, Mosquitto lives on and keeps collecting; the next start of the service takes it over.

    Args:
        program: path of Mosquitto.
        config: port and limits.
        folder: generated configuration, access list, queue and process number.
        host: address to bind to.
        files: TLS of the service.
    """

    def __init__(
        self, program: str, config: BrokerConfig, folder: Path, host: str, files: ServerFiles
    ) -> None:
        self._program, self._config, self._folder = program, config, folder
        self._host, self._files = host, files
        self._revoked: tuple[str, ...] = ()
        self._pid = 0
        self._taken_over = False
        self._keeper: asyncio.Task[None] | None = None
        self._endpoint: BrokerEndpoint | None = None

    @property
    def endpoint(self) -> BrokerEndpoint:
        """Loopback when it binds to every address."""
        assert self._endpoint is not None
        return self._endpoint

    async def start(self) -> None:
        """Take over the one that runs, or start one."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write_access_list()
        port = await self._take_over() or free_port(self._host, self._config.port, "broker.port")
        text = configuration(self._folder, self._files, self._host, port, self._config.max_queued)
        write_private(self._folder / "mosquitto.conf", text.encode())
        reach = "127.0.0.1" if self._host in ("0.0.0.0", "") else self._host  # noqa: S104 - compared, not bound
        self._endpoint = BrokerEndpoint(reach, port, client_context(self._files))
        process = None if self._pid else await self._launch()
        self._keeper = asyncio.create_task(self._keep_alive(process))

    def admit_devices(self) -> None:
        """The queue of the service's session exists, so nothing is lost; one that was taken over reads its list now.

        Not earlier: when Mosquitto reads it, it forgets the name of a client that is away, and drops what comes for it.
        """
        if self._taken_over:
            self._reload()

    def revoke(self, devices: Sequence[str]) -> None:
        """Write the access list again and let Mosquitto read it."""
        if tuple(devices) != self._revoked:
            self._revoked = tuple(devices)
            self._write_access_list()
            self._reload()

    async def stop(self) -> None:
        """End Mosquitto; it saves its queue."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._pid:
            await _end(self._pid)
            self._pid_file.unlink(missing_ok=True)

    @property
    def _pid_file(self) -> Path:
        return self._folder / "mosquitto.pid"

    def _write_access_list(self) -> None:
        write_private(self._folder / "access.conf", access_list(self._revoked).encode())

    def _reload(self) -> None:
        self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    async def _take_over(self) -> int:
        """Port of a Mosquitto that an earlier service left running in this folder, 0 when there is none."""
        pid = _left_running(self._pid_file, self._folder / "mosquitto.conf")
        if not pid:
            return 0
        port = _port_of(self._folder / "mosquitto.conf")
        if self._config.port not in (0, port):
            await _end(pid)
            return 0
        _LOGGER.info("taking over mosquitto, process %d, port %d", pid, port)
        self._pid, self._taken_over = pid, True
        return port

    async def _launch(self) -> asyncio.subprocess.Process:
        with (self._folder / "mosquitto.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                self._program, "-c", str(self._folder / "mosquitto.conf"),
                stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        await self._wait_until_listening(process)
        self._pid = process.pid
        write_private(self._pid_file, str(process.pid).encode())
        return process

    async def _wait_until_listening(self, process: asyncio.subprocess.Process) -> None:
        assert self._endpoint is not None
        until = asyncio.get_running_loop().time() + _START_S
        while asyncio.get_running_loop().time() < until and process.returncode is None:
            try:
                _, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        lines = (self._folder / "mosquitto.log").read_text(errors="replace").splitlines()[-3:]
        raise ConfigError(
            f"mosquitto did not start: {' | '.join(lines)}; see {self._folder / 'mosquitto.log'}"
        )

    async def _keep_alive(self, process: asyncio.subprocess.Process | None) -> None:
        delay = 0.5
        while True:
            if process is not None:
                await process.wait()
            else:
                await _until_ended(self._pid, 1.0)
            _LOGGER.error("mosquitto ended; starting it again in %.1f s", delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_RETRY_S)
            try:
                process = await self._launch()
            except ConfigError as error:
                _LOGGER.error("%s", error)  # noqa: TRY400 - the message says it all


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _left_running(pid_file: Path, configuration_file: Path) -> int:
    try:
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return 0
    return pid if str(configuration_file).encode() in words else 0


def _port_of(configuration_file: Path) -> int:
    for line in configuration_file.read_text().splitlines():
        if line.startswith("listener "):
            return int(line.split()[1])
    return 0


async def _end(pid: int) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_until_ended(pid, 0.02), _STOP_S)
            return


async def _until_ended(pid: int, every_s: float) -> None:
    while _runs(pid):  # noqa: ASYNC110 - nothing tells about the end of a process that is not our child
        await asyncio.sleep(every_s)
