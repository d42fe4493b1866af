"""One long call in which a device polls and submits, with tensors in chunks beside both (``FederationService.Work``).

A call of its own for each poll, download, upload and submission costs about as much as the bytes of a small model. The
stream is opened by the first question, stays open while the device trains, and is opened again when it was lost. A
question that was under way when it was lost fails: only its caller knows how to repeat it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from wearfleet_protos.chunks import CHUNK_BYTES, RECEIVED_CHUNK, SENT_CHUNK, chunk_message, split_chunk
from wearfleet_protos.errors import IntegrityError, ProtocolError, TransportError
from wearfleet_protos.v1 import federation_pb2, secagg_pb2

if TYPE_CHECKING:
    from wearfleet_protos.chunks import WireChunk

__all__ = ["WorkStream", "next_offset", "update_messages"]

T = TypeVar("T")

_METHOD: Final = "/wearfleet.v1.FederationService/Work"


class _Call(Protocol):
    def __next__(self) -> bytes: ...

    def is_active(self) -> bool: ...

    def cancel(self) -> bool: ...


class _Limit:
    """Ends a call whose next message takes too long, because reading it has no time limit of its own.

    One thread, which sleeps for as long as it can: a device that waits for work costs no wake-ups.

    Args:
        end: ends the call.
    """

    def __init__(self, end: Callable[[], object]) -> None:
        self._end = end
        self._changed = threading.Condition()
        self._until = self._wakes = math.inf
        self._stopped = self.passed = False
        threading.Thread(target=self._watch, name="work stream", daemon=True).start()

    def set(self, until: float) -> None:
        """The next message must be there at this monotonic time; infinity while none is wanted."""
        with self._changed:
            self._until = until
            if until < self._wakes:
                self._changed.notify()

    def stop(self) -> None:
        """Watch no longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._stopped:
                left = self._until - time.monotonic()
                if left <= 0.0:
                    self.passed = True
                    self._end()
                    return
                self._wakes = self._until
                self._changed.wait(None if left == math.inf else min(left, threading.TIMEOUT_MAX))


@dataclass(frozen=True, slots=True)
class _Connection:
    """One call, what is to be sent (None ends it), and how long it may take."""

    call: _Call
    outgoing: SimpleQueue[Iterable[bytes] | None]
    limit: _Limit

    def receive(self, timeout_s: float) -> bytes:
        """The next message.

        Raises:
            grpc.RpcError: the call failed.
            TransportError: nothing came in time, or the service ended the call.
        """
        self.limit.set(time.monotonic() + timeout_s)
        try:
            return next(self.call)
        except StopIteration:
            raise TransportError("the service ended the call") from None
        except grpc.RpcError:
            if self.limit.passed:
                raise TransportError(f"the service did not answer within {timeout_s:.0f} s") from None
            raise
        finally:
            self.limit.set(math.inf)

    def close(self) -> None:
        """End the call, whatever it is doing."""
        self.outgoing.put(None)
        self.limit.stop()
        self.call.cancel()


class WorkStream:
    """Questions and answers, one at a time; safe to use from several threads.

    Every question raises ``grpc.RpcError`` when the service refuses or cannot be reached, :class:`TransportError` when
    no answer comes in time or one is damaged, :class:`ProtocolError` when it is not an answer, and
    :class:`IntegrityError` when it is larger than allowed.

    Args:
        channel: of the service.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._turn = threading.Lock()
        self._connection: _Connection | None = None

    def close(self) -> None:
        """End the call; a question under way fails."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def poll(
        self, request: federation_pb2.PollTaskRequest, timeout_s: float
    ) -> tuple[federation_pb2.PollTaskResponse, bytearray]:
        """Ask for a task; with its tensors when they were sent along, not checked against their digest yet.

        Args:
            request: ``max_streamed_bytes`` limits the tensors.
            timeout_s: longest wait for each message.
        """
        message = federation_pb2.WorkRequest(poll=request).SerializeToString()

        def answer(connection: _Connection) -> tuple[federation_pb2.PollTaskResponse, bytearray]:
            response, chunk = _parse(connection.receive(timeout_s))
            if not response.HasField("poll"):
                raise ProtocolError("the service did not answer a poll with its answer; update the agent")
            size = response.poll.task.streamed_bytes
            if size > request.max_streamed_bytes:
                raise IntegrityError(
                    f"the service sends {size} bytes of tensors, at most {request.max_streamed_bytes} are accepted"
                )
            tensors, at = bytearray(size), 0
            while at < size:
                if chunk is None:
                    raise ProtocolError(
                        f"the service sent {at} of {size} bytes of tensors and then something else"
                    )
                end = next_offset(chunk, at, size)
                tensors[at:end] = chunk.data
                at = end
                if at < size:
                    _, chunk = _parse(connection.receive(timeout_s))
            return response.poll, tensors

        return self._ask((message,), answer)

    def submit(
        self, request: federation_pb2.SubmitUpdateRequest, update: bytes, timeout_s: float
    ) -> federation_pb2.SubmitUpdateResponse:
        """Hand in a result.

        Args:
            request: the result.
            update: the bytes of its update; empty when they were uploaded before, or when it has none.
            timeout_s: longest wait for the receipt, the time to send the update included.
        """
        request.streamed_bytes = len(update)
        start = federation_pb2.WorkRequest(submit=request).SerializeToString()

        def answer(connection: _Connection) -> federation_pb2.SubmitUpdateResponse:
            response, _ = _parse(connection.receive(timeout_s))
            if not response.HasField("receipt"):
                raise ProtocolError(
                    "the service did not answer a submission with a receipt; update the agent"
                )
            return response.receipt

        return self._ask(update_messages(update, 0, start) if update else (start,), answer)

    def exchange(self, request: secagg_pb2.SecureRequest, timeout_s: float) -> secagg_pb2.SecureResponse:
        """Answer a stage of secure aggregation, and learn what follows.

        Args:
            request: the answer.
            timeout_s: longest wait for the response.
        """
        message = federation_pb2.WorkRequest(secure=request).SerializeToString()

        def answer(connection: _Connection) -> secagg_pb2.SecureResponse:
            response, _ = _parse(connection.receive(timeout_s))
            if not response.HasField("secure"):
                raise ProtocolError("the service did not answer secure aggregation; update the agent")
            return response.secure

        return self._ask((message,), answer)

    def _ask(self, messages: Iterable[bytes], answer: Callable[[_Connection], T]) -> T:
        """Send a question and read its answer; on a new call when there is none, or the one that was open was lost."""
        with self._turn:
            if self._connection is not None and not self._connection.call.is_active():
                self.close()
            connection = self._connection or self._connect()
            try:
                connection.outgoing.put(messages)
                return answer(connection)
            except BaseException:
                self.close()  # nobody knows any more what comes next
                raise

    def _connect(self) -> _Connection:
        outgoing: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(_METHOD)
        call = method(_outgoing(outgoing))
        self._connection = _Connection(call, outgoing, _Limit(call.cancel))
        return self._connection


def next_offset(chunk: WireChunk, at: int, end: int) -> int:
    """Where the chunk after this one begins.

    Args:
        chunk: as it came.
        at: where it must begin.
        end: of the whole.

    Raises:
        ProtocolError: it is another one.
        TransportError: its bytes were damaged; retryable.
        IntegrityError: it goes beyond the end.
    """
    if chunk.offset != at or not chunk.data:
        raise ProtocolError(f"expected a chunk at offset {at}, got {len(chunk.data)} bytes at {chunk.offset}")
    if not chunk.intact:
        raise TransportError(f"the chunk at offset {at} was damaged on the way")
    if at + len(chunk.data) > end:
        raise IntegrityError(f"the artifact is larger than the {end} bytes that are accepted")
    return at + len(chunk.data)


def update_messages(data: bytes, offset: int, rest: bytes) -> Iterator[bytes]:
    """Wire messages with the chunks of an artifact from an offset on; ``rest`` travels in the first one."""
    view = memoryview(data)
    for at in range(offset, len(data), CHUNK_BYTES):
        yield chunk_message(SENT_CHUNK, at, view[at : at + CHUNK_BYTES], rest if at == offset else b"")


def _outgoing(queue: SimpleQueue[Iterable[bytes] | None]) -> Iterator[bytes]:
    while (messages := queue.get()) is not None:
        yield from messages


def _parse(message: bytes) -> tuple[federation_pb2.WorkResponse, WireChunk | None]:
    rest, chunk = split_chunk(RECEIVED_CHUNK, message)
    try:
        return federation_pb2.WorkResponse.FromString(rest), chunk
    except DecodeError as error:
        raise ProtocolError(f"not an answer of the service: {error}") from error
