"""Around every call: who calls, what went wrong, how long it took. A call never ends with status UNKNOWN."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from wearfleet_protos.errors import (
    AggregationError,
    ConfigError,
    ConflictError,
    DataError,
    DeniedError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
    ShapeError,
    TransportError,
    WearfleetError,
)

from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.service.metrics import Metrics

__all__ = ["CODES", "Guard", "GuardedPipe", "code_of", "parse"]

_LOGGER: Final = logging.getLogger(__name__)
_DETAILS: Final = "grpc-status-details-bin"

CODES: Final[Mapping[type[WearfleetError], grpc.StatusCode]] = {
    ConfigError: grpc.StatusCode.FAILED_PRECONDITION,
    DataError: grpc.StatusCode.INVALID_ARGUMENT,
    ShapeError: grpc.StatusCode.INVALID_ARGUMENT,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    TransportError: grpc.StatusCode.UNAVAILABLE,
    IntegrityError: grpc.StatusCode.DATA_LOSS,
    AggregationError: grpc.StatusCode.FAILED_PRECONDITION,
    DeniedError: grpc.StatusCode.PERMISSION_DENIED,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ConflictError: grpc.StatusCode.ABORTED,
}

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)
T = TypeVar("T")


def code_of(error: WearfleetError) -> grpc.StatusCode:
    """The gRPC status of one of our errors, by its nearest class in :data:`CODES`."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


class Guard:
    """Turns functions of (device, request) into gRPC method handlers.

    Requests arrive as bytes and are parsed here, so that junk is an INVALID_ARGUMENT like every other bad input.

    Args:
        directory: who is enrolled.
        metrics: counts.
    """

    def __init__(self, directory: Directory, metrics: Metrics) -> None:
        self._directory, self._metrics = directory, metrics
        self._reading: set[asyncio.Task[Any]] = set()
        self._ending = False

    def anonymous(
        self, name: str, kind: type[M], function: Callable[[M], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """A call without a client certificate."""

        async def call(data: bytes, context: Context) -> bytes:
            async def work() -> bytes:
                return (await function(parse(kind, data))).SerializeToString()

            return await self._run(name, work, context)

        return grpc.unary_unary_rpc_method_handler(call)

    def unary(
        self, name: str, kind: type[M], function: Callable[[str, M], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """One request, one response."""

        async def call(data: bytes, context: Context) -> bytes:
            async def work() -> bytes:
                return (await function(self._caller(context), parse(kind, data))).SerializeToString()

            return await self._run(name, work, context)

        return grpc.unary_unary_rpc_method_handler(call)

    def upload(
        self, name: str, function: Callable[[str, AsyncIterator[bytes]], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Many requests, not parsed, because their bytes are not to be copied; one response."""

        async def call(stream: AsyncIterator[bytes], context: Context) -> bytes:
            async def work() -> bytes:
                return (await function(self._caller(context), stream)).SerializeToString()

            return await self._run(name, work, context)

        return grpc.stream_unary_rpc_method_handler(call)

    def stream(
        self, name: str, function: Callable[[GuardedPipe], Awaitable[None]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Questions and answers, not parsed, for as long as the device wants."""

        async def call(_: AsyncIterator[bytes], context: Context) -> None:
            await self._run(name, lambda: function(GuardedPipe(self, context)), context)

        return grpc.stream_stream_rpc_method_handler(call)

    def end_streams(self) -> None:
        """End the streams whose device asks nothing now; those under way end with their answer."""
        self._ending = True
        for reading in tuple(self._reading):
            reading.cancel()

    def download(
        self, name: str, kind: type[M], function: Callable[[str, M], AsyncIterator[bytes]]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """One request, many responses that are serialised already."""

        async def call(data: bytes, context: Context) -> None:
            async def work() -> None:
                async for message in function(self._caller(context), parse(kind, data)):
                    await context.write(message)

            await self._run(name, work, context)

        return grpc.unary_stream_rpc_method_handler(call)

    def _caller(self, context: Context) -> str:
        """The device, from its certificate and from nowhere else.

        Raises:
            DeniedError: no certificate, not enrolled here, or revoked.
        """
        names = tuple(context.auth_context().get("x509_common_name", ()))
        if len(names) != 1:
            raise DeniedError("this call needs the certificate of an enrolled device")
        device_id = names[0].decode(errors="replace")
        return self._directory.active(device_id).device_id

    async def _run(self, name: str, work: Callable[[], Awaitable[T]], context: Context) -> T:
        began = time.perf_counter()
        code = grpc.StatusCode.CANCELLED  # unless one of the branches below is reached
        try:
            result = await work()
            code = grpc.StatusCode.OK
        except WearfleetError as error:
            code = code_of(error)
            await _abort(context, code, error, str(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            _LOGGER.exception("call %s failed", name)
            await _abort(context, code, error, "internal error; the service's log tells more")
        finally:
            self._count(name, code, began)
        return result

    def _count(self, name: str, code: grpc.StatusCode, began: float) -> None:
        self._metrics.calls.labels(name, code.name).inc()
        self._metrics.call_seconds.labels(name).observe(time.perf_counter() - began)

    async def _read(self, context: Context) -> bytes | None:
        """The next message of a stream; None at its end, and when the service stops."""
        if self._ending:
            return None
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            message = await context.read()
        except asyncio.CancelledError:
            if self._ending:
                return None
            raise
        finally:
            self._reading.discard(task)
        return None if message is grpc.aio.EOF else message


class GuardedPipe:
    """One device's stream.

    Args:
        guard: knows who is enrolled.
        context: of the call.
    """

    def __init__(self, guard: Guard, context: Context) -> None:
        self._guard, self._context = guard, context

    @property
    def device(self) -> str:
        """The device, from its certificate; checked each time, because it can be revoked while the stream is open.

        Raises:
            DeniedError: no certificate, not enrolled here, or revoked.
        """
        return self._guard._caller(self._context)  # noqa: SLF001 - a part of the guard

    async def read(self) -> bytes | None:
        """The next message; None at the end."""
        return await self._guard._read(self._context)  # noqa: SLF001

    async def write(self, message: bytes) -> None:
        """Send a message."""
        await self._context.write(message)

    async def timed(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Count a question as a call of this name."""
        began, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            await work()
            code = grpc.StatusCode.OK
        except WearfleetError as error:
            code = code_of(error)
            raise
        finally:
            self._guard._count(name, code, began)  # noqa: SLF001


def parse(kind: type[M], data: bytes) -> M:
    """A message from its wire bytes.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"not a {kind.DESCRIPTOR.full_name}: {error}") from error


async def _abort(context: Context, code: grpc.StatusCode, error: Exception, text: str) -> NoReturn:
    retryable = isinstance(error, TransportError) and error.retryable
    info = ErrorInfo(
        reason=type(error).__name__, domain="wearfleet", metadata={"retryable": str(retryable).lower()}
    )
    packed = AnyMessage()
    packed.Pack(info)
    status = Status(code=code.value[0], message=text, details=[packed])
    await context.abort(code, text, trailing_metadata=((_DETAILS, status.SerializeToString()),))
