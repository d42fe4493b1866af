"""Take part in federated rounds: ask, fetch, verify, run the plan, hand in, and keep what stays here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from wearfleet_protos.codecs import Encoded, Residual
from wearfleet_protos.errors import (
    ConflictError,
    DeniedError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
    TransportError,
    WearfleetError,
)
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.signing import MAX_SIGNED_BYTES, verify
from wearfleet_protos.tensors import NO_RANK_LIMIT, digest_of, encode_tensors

from wearfleet_edge.downloads import Downloads
from wearfleet_edge.local_state import LocalState, PendingResult, PersonalOrigin
from wearfleet_edge.memory import release_memory
from wearfleet_edge.policy import PlanDemands, require_demands
from wearfleet_edge.pulse import Pulse
from wearfleet_edge.trainer import start_state, upload_tensors
from wearfleet_edge.transport.backoff import Backoff, with_retries
from wearfleet_edge.transport.cloud import Receipt, ReceiptStatus, Stage, Submission, Task

if TYPE_CHECKING:
    from wearfleet_protos.tensors import Digest

    from wearfleet_edge.artifacts import ArtifactStore
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.runtime import Evaluation
    from wearfleet_edge.secagg_client import Member
    from wearfleet_edge.secure_task import SecureTask
    from wearfleet_edge.slots import InstalledModel
    from wearfleet_edge.trainer import Limits, PlanResult, Tensors
    from wearfleet_edge.transport.cloud import Cloud

__all__ = ["Device", "FederatedWorker", "PlanStore", "Progress", "Trainer"]

_LOG = logging.getLogger(__name__)

_ATTEMPTS: Final = 5
_AFTER_REFUSAL_SECONDS: Final = 2.0


class Trainer(Protocol):
    """Computes tasks: this device on its wearer's windows, or a whole site that takes part as one device."""

    def run(
        self, plan: Plan, graphs: Mapping[Digest, bytes], before: Tensors, *, task: Task, limits: Limits
    ) -> PlanResult:
        """What a verified plan makes of the state that it starts from; see ``trainer.run_plan`` for its errors."""

    def base(self) -> Evaluation:
        """Quality of the model as released."""

    def personalise(
        self, plan: Plan, result: PlanResult, installed: InstalledModel, origin: PersonalOrigin
    ) -> tuple[bytes, Evaluation]:
        """The file of personal tensors that a last training gave (empty: none are kept), and their quality."""


@dataclass(frozen=True, slots=True)
class Device:
    """What of the device a federated task may use.

    Args:
        keys: trusted raw public keys by key id.
        trainer: computes tasks.
        limits: computation limits, given the seconds that a task has left.
        max_bytes: most bytes of one task on the wire.
        poll_seconds: how long to wait for a task at the server.
        wait: waits the given seconds and tells whether the agent stops.
        member: this device in secure aggregation; made when a task asks for it.
        secure_only: no update and no figure of this device is sent but in a secure sum.
        demands: what a plan must fulfil.
        max_lora_rank: highest rank of low-rank factors that it trains.
    """

    keys: Mapping[str, bytes]
    trainer: Trainer
    limits: Callable[[float], Limits]
    max_bytes: float
    poll_seconds: float
    wait: Callable[[float], bool]
    member: Callable[[], Member]
    secure_only: bool = False
    demands: PlanDemands = field(default_factory=PlanDemands)
    max_lora_rank: int = NO_RANK_LIMIT


@dataclass(slots=True)
class Progress:
    """Counts since the agent's start, for its status."""

    rounds: int = 0
    declined: int = 0
    bytes_up: int = 0
    train_seconds: float = 0.0
    last_round: int = 0
    last_error: str = ""


class PlanStore:
    """Plans whose signature was checked; keeps the last one, because all rounds of a run have the same.

    Args:
        artifacts: where their bytes come from.
        keys: trusted raw public keys by key id.
    """

    def __init__(self, artifacts: ArtifactStore, keys: Mapping[str, bytes]) -> None:
        self._artifacts, self._keys = artifacts, keys
        self._last: tuple[str, Plan] | None = None

    def fetch(self, task: Task) -> Plan:
        """The plan of a task.

        Raises:
            IntegrityError: too large, or neither its digest nor a trusted signature fits.
            ProtocolError: not a plan of this version.
            TransportError: the network failed.
        """
        if task.plan_bytes > MAX_SIGNED_BYTES:
            raise IntegrityError(
                f"the plan has {task.plan_bytes} bytes, at most {MAX_SIGNED_BYTES} are accepted"
            )
        if self._last is None or self._last[0] != task.plan_digest:
            signed = self._artifacts.fetch(task.plan_digest, task.plan_bytes)
            self._last = task.plan_digest, Plan.from_bytes(verify(signed, self._keys, PLAN_MEDIA_TYPE))
        return self._last[1]


class FederatedWorker:
    """Does one task after the other.

    Args:
        cloud: the service.
        artifacts: plans, graphs and tensors.
        local: what stays on the device.
        active: the model in use.
        device: data and limits.
        backoff: delays between tries.
    """

    def __init__(
        self,
        *,
        cloud: Cloud,
        artifacts: ArtifactStore,
        local: LocalState,
        active: ActiveModel,
        device: Device,
        backoff: Backoff,
    ) -> None:
        self._cloud = cloud
        self._artifacts = artifacts
        self._local = local
        self._active = active
        self._device = device
        self._backoff = backoff
        self._refused_attempt = ""
        self._plans = PlanStore(artifacts, device.keys)
        self._downloads = Downloads(artifacts, local.held)
        self._secure: SecureTask | None = None
        self.progress = Progress()

    def step(self) -> float:
        """Hand in what is pending, or wait for a task and do it.

        Returns:
            Seconds to wait before the next step.

        Raises:
            TransportError: the network failed; a computed result is kept and handed in by the next step.
        """
        pending = self._local.pending()
        if pending is not None:
            self._deliver(pending)
            return 0.0
        installed = self._active.installed
        if installed is None:
            return _AFTER_REFUSAL_SECONDS
        held = self._downloads.held()
        reply = self._cloud.poll_task(self._device.poll_seconds, installed.manifest_digest, held)
        if reply.task is None:
            return reply.retry_after_s
        if reply.task.attempt_id == self._refused_attempt:
            return max(reply.retry_after_s, _AFTER_REFUSAL_SECONDS)
        self._work(reply.task, self._active.installed or installed)  # a new model may have come meanwhile
        return 0.0

    def _work(self, task: Task, installed: InstalledModel) -> None:
        try:
            result = self._compute(task, installed)
        except TransportError:
            raise
        except WearfleetError as error:
            if self._device.wait(0.0):
                return  # the agent is stopping; the task waits at the server
            self._refused_attempt = task.attempt_id
            self.progress.declined += 1
            self.progress.last_error = f"{type(error).__name__}: {error}"
            _LOG.warning("declined round %d of %s: %s", task.round_number, task.run_id, error)
            self._cloud.decline(task, self.progress.last_error)
            return
        finally:
            release_memory()
        if result is not None:
            self._local.save(result)
            self._deliver(result)

    def _compute(self, task: Task, installed: InstalledModel) -> PendingResult | None:
        """Fetch, check and run a task; None when the round ended meanwhile."""
        plan = self._fetch_plan(task)
        _require_match(plan, installed)
        require_demands(self._device.demands, plan, uploads=not task.personalise)
        self._require_first(task, plan)
        graphs = {p.graph: self._artifacts.fetch(p.graph, p.graph_bytes) for p in plan.phases}
        downloaded = self._download(task, plan)
        self._artifacts.keep_only({task.plan_digest, *graphs})
        local, was_reset = self._local.local_tensors(task.run_id, plan.local_specs())
        if not self._cloud.report_stage(task, Stage.FETCHED):
            return None
        self._join(task, plan)
        before = start_state(plan, downloaded, local, max_lora_rank=self._device.max_lora_rank)
        self._cloud.report_stage(task, Stage.TRAINING)
        pulse = Pulse(self._cloud, task, self._device.limits(task.remaining_seconds))
        try:
            result = self._device.trainer.run(plan, graphs, before, task=task, limits=pulse.limits())
        except DeniedError:
            if not pulse.unwanted:
                raise
            _LOG.info("round %d of %s is over without this device", task.round_number, task.run_id)
            return None
        self.progress.train_seconds += result.seconds
        return self._result(task, plan, before, result, was_reset=was_reset, installed=installed)

    def _require_first(self, task: Task, plan: Plan) -> None:
        """Noise that is drawn anew for a second update of a round would average out, and cost privacy again.

        Raises:
            DeniedError: this device made a noised update for that round, or a later one, before.
        """
        if (
            not task.personalise
            and plan.noised()
            and task.round_number <= self._local.noised.last(task.run_id)
        ):
            raise DeniedError(
                f"this device made its noised update for round {task.round_number} or a later one before"
            )

    def _join(self, task: Task, plan: Plan) -> None:
        """Share keys with the others of a secure round; once a round, whatever the service says.

        Raises:
            DeniedError: this device was in that round before, the cohort is too small for it, or it sends nothing
                without secure aggregation and the task has none.
            WearfleetError: see ``SecureTask.share_keys``.
        """
        self._leave_secure()
        if task.secure is None:
            if self._device.secure_only and not task.personalise:
                raise DeniedError(
                    "this device sends updates with secure aggregation only (federation.secure_only)"
                )
            return
        if task.round_number <= self._local.joined.last(task.run_id):
            raise DeniedError(f"this device shared keys for round {task.round_number} or a later one before")
        from wearfleet_edge.secure_task import SecureTask  # noqa: PLC0415  slow to import

        self._local.joined.note(task.run_id, task.round_number)
        member, specs, wait = self._device.member(), plan.upload_specs(), self._device.wait
        self._secure = SecureTask(self._cloud, task, member, specs, backoff=self._backoff, wait=wait)
        self._secure.share_keys()

    def _leave_secure(self) -> None:
        if self._secure is not None:
            self._secure.close()
            self._secure = None

    def _fetch_plan(self, task: Task) -> Plan:
        plan = self._plans.fetch(task)
        self._allow(task, plan, task.difference_bytes if task.held_digest else task.tensors_bytes)
        return plan

    def _download(self, task: Task, plan: Plan) -> Tensors:
        tensors = self._downloads.from_held(task, plan)
        if tensors is not None:
            return tensors
        self._allow(task, plan, task.difference_bytes + task.tensors_bytes)
        return self._downloads.whole(task, plan)

    def _allow(self, task: Task, plan: Plan, down: int) -> None:
        graphs = {p.graph: p.graph_bytes for p in plan.phases if not self._artifacts.has(p.graph)}
        uploaded = 0 if task.personalise else plan.update_format().most_bytes(task.round_number)
        total = down + sum(graphs.values()) + uploaded
        allowed = min(plan.budget.max_bytes, self._device.max_bytes)
        if total > allowed:
            raise DeniedError(f"the task moves {total} bytes, at most {allowed:.0f} are allowed")

    def _result(
        self,
        task: Task,
        plan: Plan,
        before: Tensors,
        result: PlanResult,
        *,
        was_reset: bool,
        installed: InstalledModel,
    ) -> PendingResult:
        base = self._device.trainer.base()
        metrics = {"base/correct": float(base.correct), "base/count": float(base.count), **result.metrics}
        update = local = personal = owed = b""
        if task.personalise:
            origin = PersonalOrigin(installed.manifest_digest, task.run_id, task.round_number)
            personal, own = self._device.trainer.personalise(plan, result, installed, origin)
            metrics |= {"personal/correct": float(own.correct), "personal/count": float(own.count)}
        else:
            if plan.noised():
                self._local.noised.note(task.run_id, task.round_number)
            encoded, lost = self._encode(task, plan, before, result)
            update, owed, was_reset = encoded.data, encoded.residual.to_bytes(), was_reset or lost
            names = [spec.name for spec in plan.local_specs()]
            local = encode_tensors({name: result.state[name] for name in names}) if names else b""
        counted = not task.without_figures and not self._device.secure_only and not plan.upload.noise
        told = counted and not plan.protects_windows()  # their number is no secret, what they are is one
        submission = Submission(
            run_id=task.run_id,
            round_number=task.round_number,
            attempt_id=task.attempt_id,
            update_digest=digest_of(update) if update else "",
            base_digest=task.tensors_digest,
            num_examples=result.num_examples if counted else 1,
            num_steps=result.num_steps if counted else 0,
            metrics=metrics if told else {},
            train_seconds=result.seconds if told else 0.0,
            local_state_reset=was_reset and told,
        )
        return PendingResult(submission, update, local, personal, owed)

    def _encode(self, task: Task, plan: Plan, before: Tensors, result: PlanResult) -> tuple[Encoded, bool]:
        """The update masked, or in the plan's codec; and whether what earlier ones still owed was lost."""
        update = upload_tensors(plan, before, result.state)
        if self._secure is not None:
            return Encoded(self._secure.masked(update, result.num_examples), Residual()), False
        residual, lost = self._local.residual(task.run_id)
        encoded = plan.update_format().encode(
            update, residual, round_number=task.round_number, client=task.attempt_id
        )
        return encoded, lost

    def _deliver(self, result: PendingResult) -> None:
        """Hand in a result; keep it when the network fails, promote or forget it by the receipt."""
        submission = result.submission
        try:
            receipt = self._hand_in(result)
        except (ConflictError, DeniedError, NotFoundError, ProtocolError) as error:
            self._forget(submission, str(error))
            return
        if receipt.status in (ReceiptStatus.STALE, ReceiptStatus.REJECTED):
            self._forget(submission, f"{receipt.status.value}: {receipt.reason}")
            return
        self._local.promote(result)
        self.progress.rounds += 1
        self.progress.last_round = submission.round_number
        self.progress.last_error = ""
        _LOG.info("round %d of %s is counted", submission.round_number, submission.run_id)
        if result.personal:
            self._use_personal()
        if self._secure is not None and self._secure.attempt_id == submission.attempt_id:
            self._secure.unmask()
        self._leave_secure()

    def _hand_in(self, result: PendingResult) -> Receipt:
        receipt = with_retries(
            lambda: self._cloud.submit(result.submission, result.update),
            attempts=_ATTEMPTS,
            backoff=self._backoff,
            wait=self._device.wait,
        )
        self.progress.bytes_up += len(result.update)
        return receipt

    def _forget(self, submission: Submission, reason: str) -> None:
        self._refused_attempt = submission.attempt_id
        self.progress.last_error = reason
        _LOG.warning("round %d of %s does not count: %s", submission.round_number, submission.run_id, reason)
        self._local.discard()
        self._leave_secure()

    def _use_personal(self) -> None:
        installed = self._active.installed
        personal = self._local.personal(installed.manifest_digest) if installed else None
        if installed is not None and personal is not None:
            self._active.use(installed, personal)


def _require_match(plan: Plan, installed: InstalledModel) -> None:
    """The plan must be for this model and for windows as this model sees them.

    Raises:
        IntegrityError: says what differs.
    """
    manifest = installed.manifest
    if plan.model_schema_hash != manifest.schema_hash:
        raise IntegrityError(
            f"the plan is for a model with schema {plan.model_schema_hash}, in use is {manifest.schema_hash}"
        )
    if plan.contract != manifest.contract:
        raise IntegrityError("the plan expects other channels, rate, windows or labels than the model in use")
