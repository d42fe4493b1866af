"""The HTTP side: live page, JSON interface, ``/metrics`` and ``/healthz``, on one port."""

import asyncio
import contextlib
import socket
import warnings
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from wearfleet_protos.errors import ConfigError

from wearfleet_cloud.service.live import LiveState
from wearfleet_cloud.service.metrics import Metrics
from wearfleet_cloud.service.web.page import mount

__all__ = ["WebServer"]


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the service."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield


class WebServer:
    """uvicorn in the service's event loop.

    Args:
        live: picture to show.
        metrics: what ``/metrics`` tells.
        healthy: what ``/healthz`` tells.
        host: address to bind to.
        port: 0 means any free one.

    Raises:
        ConfigError: the port is in use.
    """

    def __init__(
        self, live: LiveState, metrics: Metrics, healthy: Callable[[], bool], *, host: str, port: int
    ) -> None:
        self._live, self._metrics = live, metrics
        self._socket = _bind(host, port)
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            self._application(healthy),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=3,
        )
        self._server = _Uvicorn(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve; returns when the first request can come.

        Raises:
            ConfigError: the page did not start.
        """
        self._task = asyncio.create_task(self._serve())
        with (
            warnings.catch_warnings()
        ):  # NiceGUI looks at every object of the process; parts of torch mind that
            warnings.simplefilter("ignore", FutureWarning)
            while not self._server.started:
                if self._task.done():
                    self._task.result()
                await asyncio.sleep(0.01)

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        except SystemExit as error:  # uvicorn's way to say that the application did not start
            raise ConfigError("the web page did not start; the log tells why") from error

    async def stop(self) -> None:
        """Close connections."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()

    def _application(self, healthy: Callable[[], bool]) -> FastAPI:
        application = FastAPI(title="wearfleet", docs_url=None, redoc_url=None, openapi_url=None)

        def metrics() -> Response:
            rows = self._live.devices.values()
            self._metrics.outbox_depth.set(sum(row.outbox_depth for row in rows))
            return Response(self._metrics.expose(), media_type=CONTENT_TYPE_LATEST)

        def healthz() -> Response:
            return Response("ok\n") if healthy() else Response("stopping\n", status_code=503)

        application.get("/metrics")(metrics)
        application.get("/healthz")(healthz)
        mount(application, self._live, enrol_hint="wearfleet-edge enrol TICKET --state DIR")
        return application


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another service.web_port"
        ) from error
    return listener
