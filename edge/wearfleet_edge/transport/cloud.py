"""What the agent asks of the cloud, as an interface: the real one is gRPC, tests have one in memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from wearfleet_protos.secagg.messages import Answer, Notice
    from wearfleet_protos.secagg.parameters import SecureParameters
    from wearfleet_protos.tensors import Digest

    from wearfleet_edge.identity import Enrolment

__all__ = [
    "STREAMED_BYTES",
    "Bytes",
    "Cloud",
    "Desired",
    "Enrolled",
    "HeartbeatReply",
    "PollReply",
    "Receipt",
    "ReceiptStatus",
    "Reported",
    "Stage",
    "Submission",
    "Task",
]

STREAMED_BYTES: Final = 64 * 1024 * 1024
"""Tensors up to this size may travel beside a task or a submission; larger ones as artifacts, which can be resumed."""

Bytes = bytes | bytearray | memoryview


class Stage(Enum):
    """How far a task is."""

    FETCHED = "fetched"
    TRAINING = "training"
    UPLOADING = "uploading"


class ReceiptStatus(Enum):
    """What became of a submission."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    STALE = "stale"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Task:
    """Work of one federated round; ``personalise`` keeps the result on the device.

    ``tensors`` are the bytes of ``tensors_digest``, or of the difference if there is one, not checked yet, when they
    came with the task; otherwise empty. With a ``held_digest`` the tensors need not come whole: what the device holds
    under it and the difference make them, or it holds them already, and ``difference_digest`` is empty.
    With ``secure`` the update goes back masked; with ``without_figures`` no metrics, counts or times go with it.
    Who is silent for longer than ``lease_s`` while it works may lose its place; 0 for no limit.
    """

    run_id: str
    round_number: int
    attempt_id: str
    personalise: bool
    plan_digest: Digest
    plan_bytes: int
    tensors_digest: Digest
    tensors_bytes: int
    remaining_seconds: float
    tensors: bytes | bytearray = b""
    secure: SecureParameters | None = None
    without_figures: bool = False
    lease_s: float = 0.0
    held_digest: str = ""
    difference_digest: str = ""
    difference_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PollReply:
    """A task, or None and when to ask again."""

    task: Task | None
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Submission:
    """Result of a task; ``update_digest`` is empty when no tensors go back."""

    run_id: str
    round_number: int
    attempt_id: str
    update_digest: str
    base_digest: str
    num_examples: int
    num_steps: int
    metrics: dict[str, float]
    train_seconds: float
    local_state_reset: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """The server's answer to a submission."""

    status: ReceiptStatus
    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    """What this device runs; ``manifest_digest`` is of the signed manifest, empty when there is none."""

    agent_version: str
    manifest_digest: str
    model_version: int
    personalised: bool
    refusal: str


@dataclass(frozen=True, slots=True)
class Desired:
    """What this device should run; an empty digest wants nothing."""

    manifest_digest: str
    manifest_bytes: int
    model_version: int


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The wanted state, the server's time, and when to report again."""

    desired: Desired
    server_unix_ns: int
    next_after_s: float


@dataclass(frozen=True, slots=True)
class Enrolled:
    """Answer to an enrolment: who this device is now, and its certificate chain, PEM."""

    enrolment: Enrolment
    chain_pem: bytes


class Cloud(Protocol):
    """The service's calls.

    Every call raises :class:`TransportError` when the network or the service fails (``retryable`` tells whether
    to try again), :class:`DeniedError`, :class:`NotFoundError`, :class:`ConflictError` or :class:`ProtocolError`
    when the service refuses.
    """

    def heartbeat(self, reported: Reported) -> HeartbeatReply:
        """Report what runs, learn what should."""

    def poll_task(self, wait_s: float, manifest_digest: str, held: Sequence[str] = ()) -> PollReply:
        """Wait for work; ``held`` are digests of tensors that need not come again."""

    def report_stage(self, task: Task, stage: Stage) -> bool:
        """Tell how far a task is; False when the round is over."""

    def submit(self, submission: Submission, update: bytes) -> Receipt:
        """Hand in a result with the bytes of its update (empty when it has none); safe to repeat."""

    def exchange(self, task: Task, answer: Answer | None, wait_s: float) -> Notice | None:
        """Answer a stage of secure aggregation (None: ask what follows the masked input); safe to repeat.

        Returns:
            What follows; None when the others are still awaited, and after the last stage.
        """

    def decline(self, task: Task, reason: str) -> None:
        """Turn a task down."""

    def download(self, digest: Digest, partial: Path, max_bytes: int) -> None:
        """Append to ``partial`` what it lacks of an artifact; at most ``max_bytes`` in all."""

    def receive(self, digest: Digest, parts: list[Bytes], max_bytes: int) -> None:
        """Append to ``parts`` what they lack of an artifact; at most ``max_bytes`` in all."""

    def upload(self, digest: Digest, data: bytes) -> None:
        """Store an artifact, from where an earlier upload stopped."""

    def renew_certificate(self, csr_der: bytes) -> bytes:
        """A fresh certificate chain, PEM."""
