"""What devices ask of federated runs: a task, an upload, a submission. The run itself is the coordinator's."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from wearfleet_protos.errors import ConflictError, DeniedError, IntegrityError, ShapeError
from wearfleet_protos.secagg.messages import Answer as SecureAnswer
from wearfleet_protos.secagg.messages import Notice
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated.round_events import (
    Answer,
    AnswerStatus,
    ClientDeclined,
    ClientReturned,
    TaskFetched,
    UpdateRejected,
    UpdateSubmitted,
)
from wearfleet_cloud.service.coordinator import Coordinator, FederationParts
from wearfleet_cloud.service.differences import Differences
from wearfleet_cloud.service.downlinks import Downlinks
from wearfleet_cloud.service.leases import DeviceClass
from wearfleet_cloud.service.live import Stage
from wearfleet_cloud.service.round_keeper import RoundKeeper
from wearfleet_cloud.service.run_context import Task, attempt_id_for
from wearfleet_cloud.storage.run_records import Submission, find_submission

__all__ = ["Federation"]

_LOGGER: Final = logging.getLogger(__name__)


class Federation:
    """The calls of devices.

    Args:
        parts: what runs need of the service.
        coordinator: of the runs.
    """

    def __init__(self, parts: FederationParts, coordinator: Coordinator) -> None:
        self._parts, self._coordinator = parts, coordinator
        self._downlinks = Downlinks(parts.blobs, parts.on_tensors)
        self._differences = Differences(parts.database, parts.blobs, parts.on_tensors)

    async def poll(
        self, device_id: str, wait_s: float, kind: DeviceClass | None = None, held: Sequence[str] = ()
    ) -> Task | None:
        """A task for this device, at once or within ``wait_s``; None when there is none.

        Args:
            device_id: who asks.
            wait_s: longest wait.
            kind: what it is.
            held: digests of tensors that it holds.
        """
        self._coordinator.leases.renew(device_id, kind)
        until = time.monotonic() + wait_s
        self._coordinator.room.note(device_id)
        while True:
            await self._coordinator.choose_clients()
            task = await self._task_for(device_id, held)
            left = until - time.monotonic()
            if task is not None or left <= 0 or self._coordinator.stopping:
                break
            await self._coordinator.room.wait(device_id, left)
        if task is not None:
            await self._note_fetched(device_id, task)
        return task

    def alive(self, device_id: str) -> None:
        """A device gives a sign of life."""
        self._coordinator.leases.renew(device_id)

    async def report(self, device_id: str, run_id: str, round_number: int, stage: Stage) -> bool:
        """Note how far a device is; False when its work is not wanted any more. Who was lost is back.

        Raises:
            TransportError: the database is busy or away; nothing has changed.
        """
        self.alive(device_id)
        keeper = self._keeper_of(device_id, run_id, round_number)
        if keeper is None or not keeper.open_for(device_id):
            return False
        if device_id in keeper.round.lost:
            async with self._coordinator.lock:
                if keeper is not self._coordinator.keeper or not keeper.open_for(device_id):
                    return False
                await self._coordinator.happen(ClientReturned(device_id))
        keeper.stages[device_id] = stage
        self._coordinator.display.soon()
        return True

    def may_upload(self, device_id: str) -> bool:
        """True while an update of this device would count."""
        keeper = self._coordinator.keeper
        return keeper is not None and keeper.kind == "train" and keeper.takes_update(device_id)

    def count_download(self, size_bytes: int) -> None:
        """Bytes of tensors sent to a device in the present round."""
        self._parts.metrics.update_bytes.labels("down").inc(size_bytes)
        if self._coordinator.keeper is not None:
            self._coordinator.keeper.bytes_down += size_bytes

    async def answer_securely(
        self, device_id: str, run_id: str, round_number: int, answer: SecureAnswer | None, wait_s: float
    ) -> Notice | None:
        """A device's answer to a stage of secure aggregation; what follows, None while others are awaited.

        Raises:
            ConflictError: the round is over, or goes on without this device.
            DeniedError: it was not invited, or is not asked.
            ProtocolError: the answer is malformed.
            IntegrityError: a signature is wrong.
        """
        room = self._coordinator.secure.room_of(run_id, round_number)
        return await room.exchange(device_id, answer, wait_s)

    async def decline(self, device_id: str, run_id: str, round_number: int, reason: str) -> None:
        """A device turns its task down; late or unknown tasks are ignored.

        Raises:
            DeniedError: it was not invited.
        """
        async with self._coordinator.lock:
            keeper = self._keeper_of(device_id, run_id, round_number)
            if keeper is None:
                return
            if device_id not in keeper.round.invited:
                raise DeniedError(f"device {device_id} was not invited to round {round_number} of {run_id}")
            await self._coordinator.happen(ClientDeclined(device_id, reason[:200]))

    async def submit(self, submission: Submission, base_digest: str) -> Answer:
        """Take a submission in; safe to repeat.

        Raises:
            DeniedError: the device was not invited, or the attempt is not its own.
            NotFoundError: the update was not uploaded.
            ConflictError: another update of this device was accepted before.
        """
        self.alive(submission.device_id)
        keeper = self._keeper_of(submission.device_id, submission.run_id, submission.round)
        if keeper is None:
            return await self._late(submission)
        expected = attempt_id_for(submission.run_id, submission.round, submission.device_id)
        if submission.device_id not in keeper.round.invited or submission.attempt_id != expected:
            raise DeniedError(
                f"device {submission.device_id} has no attempt {submission.attempt_id[:40]!r} in this round"
            )
        reason = (
            await self._fault(keeper, submission, base_digest)
            if keeper.takes_update(submission.device_id)
            else ""
        )
        counted = replace(submission, round=keeper.round.number)
        answer = await self._coordinator.submit(keeper, _event_of(submission, reason), counted)
        if answer is None:
            return await self._late(submission)
        self._parts.metrics.submissions.labels(str(answer.status)).inc()
        if answer.status == AnswerStatus.CONFLICT:
            raise ConflictError(answer.reason)
        return answer

    async def _fault(self, keeper: RoundKeeper, submission: Submission, base_digest: str) -> str:
        """Why a submission cannot be used; empty when it can."""
        assert self._coordinator.run is not None
        carried = keeper.round.carried_task(submission.device_id)
        if carried is not None and carried.attempt == submission.attempt_id:
            base = carried.base
        else:
            base = await self._downlinks.of(self._coordinator.run, keeper.round, submission.device_id)
        if base_digest != base:
            return f"it started from {base_digest[:80]!r}, its task from {base}"
        if keeper.kind == "personalise":
            return "" if not submission.update_digest else "a personalisation keeps its tensors on the device"
        if self._coordinator.run.secure:
            fault = self._coordinator.secure.fault_of(keeper, submission.device_id)
            if fault:
                return fault
        updates, update_format = self._parts.updates, self._coordinator.run.update_format
        device_id, digest = submission.device_id, Digest(submission.update_digest)
        try:
            size = await updates.check(device_id, digest, update_format)
        except (ShapeError, IntegrityError) as error:
            _LOGGER.warning("update of %s refused: %s", device_id, error)
            return str(error)[:400]
        keeper.bytes_up += size
        self._parts.metrics.update_bytes.labels("up").inc(size)
        return ""

    async def _late(self, submission: Submission) -> Answer:
        """The answer to a submission of a round that is over."""
        known = await self._parts.database.run(
            lambda connection: find_submission(connection, submission.run_id, submission.attempt_id)
        )
        own = known is not None and known.device_id == submission.device_id
        if own and known is not None and known.update_digest == submission.update_digest:
            return Answer(submission.device_id, AnswerStatus.DUPLICATE)
        return Answer(submission.device_id, AnswerStatus.STALE, "the round is over")

    def _present(self, run_id: str, round_number: int) -> RoundKeeper | None:
        keeper = self._coordinator.keeper
        same = keeper is not None and (keeper.round.run_id, keeper.round.number) == (run_id, round_number)
        return keeper if same else None

    def _keeper_of(self, device_id: str, run_id: str, round_number: int) -> RoundKeeper | None:
        """The round in which the device's task of a round may count: that one, or a later one that it is carried to."""
        keeper = self._coordinator.keeper
        task = (
            None if keeper is None or keeper.round.run_id != run_id else keeper.round.carried_task(device_id)
        )
        if task is not None and task.attempt == attempt_id_for(run_id, round_number, device_id):
            return keeper
        return self._present(run_id, round_number)

    async def _task_for(self, device_id: str, held: Sequence[str]) -> Task | None:
        run, keeper = self._coordinator.run, self._coordinator.keeper
        if run is None or keeper is None or not keeper.open_for(device_id):
            return None
        current = keeper.round
        base = await self._downlinks.of(run, current, device_id)
        return Task(
            run_id=run.run_id,
            round=current.number,
            attempt_id=attempt_id_for(run.run_id, current.number, device_id),
            kind=keeper.kind,
            plan_digest=run.row.plan_digest,
            plan_bytes=run.plan_bytes,
            tensors_digest=base,
            tensors_bytes=self._parts.blobs.size(base),
            lease_s=self._coordinator.leases.seconds(device_id),
            deadline=time.time() + current.policy.deadline_s if current.policy.buffered else current.deadline,
            secure=self._coordinator.secure.parameters_of(keeper) if keeper.kind == "train" else None,
            without_figures=run.secure,
            difference=await self._differences.to(run, current, base, held),
        )

    async def _note_fetched(self, device_id: str, task: Task) -> None:
        async with self._coordinator.lock:
            keeper = self._present(task.run_id, task.round)
            if keeper is not None:
                keeper.stages.setdefault(device_id, Stage.FETCHED)
                await self._coordinator.happen(TaskFetched(device_id))


def _event_of(submission: Submission, reason: str) -> UpdateSubmitted | UpdateRejected:
    if reason:
        return UpdateRejected(submission.device_id, submission.attempt_id, reason)
    return UpdateSubmitted(
        submission.device_id,
        submission.attempt_id,
        Digest(submission.update_digest),
        submission.num_examples,
        submission.num_steps,
    )
