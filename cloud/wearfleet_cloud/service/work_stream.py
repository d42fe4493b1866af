"""The stream of work of one device: polls and submissions one after the other, tensors in chunks beside both.

Each question does what the call of the same name does, through the same functions; only the bytes take another way.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from google.protobuf.message import DecodeError
from wearfleet_protos.chunks import CHUNK_BYTES, SENT_CHUNK, WireChunk, split_chunk
from wearfleet_protos.errors import ProtocolError, TransportError
from wearfleet_protos.secagg.codec import answer_from_pb, notice_to_pb
from wearfleet_protos.tensors import Digest
from wearfleet_protos.v1 import federation_pb2, secagg_pb2

from wearfleet_cloud.service.federation import Federation
from wearfleet_cloud.service.handlers import Artifacts
from wearfleet_cloud.service.rpc_messages import class_of, fill_task, receipt_of, submission_of, wait_of

__all__ = ["Pipe", "Turns", "WorkStreams"]

_AT_ONCE: Final = 2
_LONGEST_TURN_S: Final = 0.05
_QUESTIONS: Final[tuple[Literal["poll", "submit", "secure"], ...]] = ("poll", "submit", "secure")


class Pipe(Protocol):
    """One end of a stream."""

    @property
    def device(self) -> str:
        """Who is at the other end; checked again each time."""

    async def read(self) -> bytes | None:
        """The next message; None when the device has ended the stream."""

    async def write(self, message: bytes) -> None:
        """Send a message."""

    async def timed(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work of one question and count it as a call of this name."""


@dataclass(frozen=True, slots=True)
class WorkStreams:
    """Serves streams.

    Args:
        artifacts: tensors and updates.
        federation: tasks and submissions.
        turns: of those who get tensors.
    """

    artifacts: Artifacts
    federation: Federation
    turns: "Turns" = field(default_factory=lambda: Turns(_AT_ONCE, _LONGEST_TURN_S))

    async def serve(self, pipe: Pipe) -> None:
        """Answer questions until the device ends the stream.

        Raises:
            WearfleetError: a question was refused; the stream cannot go on.
        """
        while (message := await pipe.read()) is not None:
            request, chunk = _parse(message)
            kind = tuple(name for name in _QUESTIONS if request.HasField(name))
            if kind == ("poll",):
                await pipe.timed("PollTask", lambda: self._poll(pipe, request.poll))  # noqa: B023 - called at once
            elif kind == ("secure",):
                await pipe.timed("AnswerSecurely", lambda: self._secure(pipe, request.secure))  # noqa: B023 - called at once
            elif kind == ("submit",):
                await pipe.timed(
                    "SubmitUpdate",
                    lambda: self._submit(pipe, request.submit, chunk),  # noqa: B023 - called at once
                )
            else:
                raise ProtocolError(
                    f"a message of a work stream must hold one of {', '.join(_QUESTIONS)}, and one only"
                )

    async def _poll(self, pipe: Pipe, request: federation_pb2.PollTaskRequest) -> None:
        task = await self.federation.poll(
            pipe.device, wait_of(request), class_of(request), request.held_digests
        )
        if task is None:
            empty = federation_pb2.PollTaskResponse()
            await pipe.write(federation_pb2.WorkResponse(poll=empty).SerializeToString())
            return
        response = federation_pb2.WorkResponse()
        fill_task(response.poll.task, task)
        digest, size = task.tensors_digest, task.tensors_bytes
        if task.difference is not None:
            digest, size = Digest(task.difference.digest), task.difference.size_bytes
        if not size or size > request.max_streamed_bytes:
            await pipe.write(response.SerializeToString())
            return
        response.poll.task.streamed_bytes = size
        rest = response.SerializeToString()
        messages = self.artifacts.download(digest, 0)
        async with self.turns if size > CHUNK_BYTES else nullcontext():
            for message in messages:
                await pipe.write(rest + message)  # fields of one message in any order are that message
                rest = b""

    async def _submit(
        self, pipe: Pipe, request: federation_pb2.SubmitUpdateRequest, first: WireChunk | None
    ) -> None:
        device_id = pipe.device
        submission = submission_of(device_id, request)
        size = request.streamed_bytes
        if size:
            chunks = _chunks(pipe, first, size)
            await self.artifacts.take_in(device_id, request.update_digest, size, chunks)
        answer = await self.federation.submit(submission, request.base_digest)
        await pipe.write(federation_pb2.WorkResponse(receipt=receipt_of(answer)).SerializeToString())

    async def _secure(self, pipe: Pipe, request: secagg_pb2.SecureRequest) -> None:
        device_id = pipe.device
        answer = answer_from_pb(request, device_id)
        notice = await self.federation.answer_securely(
            device_id, request.run_id, request.round, answer, wait_of(request)
        )
        await pipe.write(federation_pb2.WorkResponse(secure=notice_to_pb(notice)).SerializeToString())


class Turns:
    """A few at a time: the first ones have all tensors early and compute while the next ones get theirs.

    Nobody waits longer than the limit, so that devices with slow networks do not hold up the others.

    Args:
        at_once: how many.
        longest_s: after this time one goes ahead in any case.
    """

    def __init__(self, at_once: int, longest_s: float) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._longest_s = longest_s
        self._holders = set[asyncio.Task[object] | None]()

    async def __aenter__(self) -> None:
        """Wait for a turn, or for the limit."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._free.acquire(), self._longest_s)
            self._holders.add(asyncio.current_task())

    async def __aexit__(self, *_: object) -> None:
        """Give the turn to the next one."""
        if asyncio.current_task() in self._holders:
            self._holders.discard(asyncio.current_task())
            self._free.release()


async def _chunks(pipe: Pipe, chunk: WireChunk | None, size: int) -> AsyncIterator[WireChunk]:
    """The chunks of an update of so many bytes, the first of which has come already."""
    came = 0
    while True:
        if chunk is None or not chunk.data:
            raise ProtocolError(f"announced were {size} bytes of an update, after {came} came something else")
        came += len(chunk.data)
        yield chunk
        if came >= size:
            return
        message = await pipe.read()
        if message is None:
            raise TransportError(f"the stream ended after {came} of {size} bytes of an update")
        _, chunk = _parse(message)


def _parse(message: bytes) -> tuple[federation_pb2.WorkRequest, WireChunk | None]:
    rest, chunk = split_chunk(SENT_CHUNK, message)
    try:
        return federation_pb2.WorkRequest.FromString(rest), chunk
    except DecodeError as error:
        raise ProtocolError(f"not a {federation_pb2.WorkRequest.DESCRIPTOR.full_name}: {error}") from error
