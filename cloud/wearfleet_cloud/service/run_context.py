"""A federated run as the service works with it: its settings, plan, strategy and tasks."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from wearfleet_protos.codecs import FLOAT32, UpdateFormat
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.plan import PLAN_MEDIA_TYPE, Plan
from wearfleet_protos.secagg.parameters import SecureParameters
from wearfleet_protos.secagg.vectors import size_of
from wearfleet_protos.secagg.words import words_spec
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round import RoundPolicy
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.run_records import RunRow

__all__ = ["ActiveRun", "Difference", "RoundKind", "RunSettings", "Task", "attempt_id_for", "load_run"]

RoundKind = Literal["train", "personalise"]


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What an operator chose for a run.

    Args:
        rounds: training rounds, at least 1.
        cohort: who is asked.
        policy: when a round has enough.
        options: hyper-parameters of the strategy.
        seed: of the cohorts.
        personalise: ask every device that took part for a last local training whose result stays with it.

    Raises:
        ProtocolError: no rounds.
    """

    rounds: int
    cohort: CohortPolicy = field(default_factory=CohortPolicy)
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    options: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    personalise: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ProtocolError(f"a run needs at least one round, got {self.rounds}")

    def to_dict(self) -> dict[str, object]:
        """Values that JSON can hold; inverse of :meth:`from_dict`."""
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Settings as they were stored.

        Raises:
            ProtocolError: not stored settings.
        """
        try:
            cohort, policy = CohortPolicy(**stored["cohort"]), RoundPolicy(**stored["policy"])
            return cls(**{**stored, "cohort": cohort, "policy": policy})
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"stored settings of a run cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class ActiveRun:
    """What does not change while a run goes on; ``update_format`` of what devices send, masked if the run is secure."""

    row: RunRow
    settings: RunSettings
    plan: Plan
    plan_bytes: int
    strategy: Strategy
    update_format: UpdateFormat

    @property
    def run_id(self) -> str:
        """Identity of the run."""
        return self.row.run_id

    @property
    def secure(self) -> bool:
        """Only the sum of a round's updates can be read."""
        return bool(self.strategy.secure.addition)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a device holds, and the artifact that leads from there; "" and 0 when it needs nothing more."""

    held: str
    digest: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """What a device is asked to do; ``deadline`` in Unix seconds.

    With a ``difference`` the tensors need not go down whole. With ``secure`` its update is masked; with
    ``without_figures`` it sends no metrics, counts or times.
    """

    run_id: str
    round: int
    attempt_id: str
    kind: RoundKind
    plan_digest: str
    plan_bytes: int
    tensors_digest: Digest
    tensors_bytes: int
    deadline: float
    lease_s: float = 0.0
    secure: SecureParameters | None = None
    without_figures: bool = False
    difference: Difference | None = None


def attempt_id_for(run_id: str, round_number: int, device_id: str) -> str:
    """The idempotency key of a device's part in a round: the same whenever the task is offered."""
    return hashlib.sha256(f"{run_id}\n{round_number}\n{device_id}".encode()).hexdigest()[:32]


def load_run(row: RunRow, blobs: Blobs, keys: SigningKeys) -> ActiveRun:
    """Read a run's plan back and check its signature.

    Raises:
        IntegrityError: the plan was changed.
        NotFoundError: the plan is missing.
        ConfigError: the strategy or one of its options is unknown to this version.
        ProtocolError: the stored settings cannot be read.
    """
    document = blobs.read(Digest(row.plan_digest))
    plan = Plan.from_bytes(keys.verify(document, PLAN_MEDIA_TYPE))
    settings = RunSettings.from_dict(row.settings)
    strategy = create_strategy(row.strategy, settings.options)
    masked = UpdateFormat((words_spec(size_of(plan.upload_specs())),), FLOAT32, plan.seed)
    return ActiveRun(
        row,
        settings,
        plan,
        len(document),
        strategy,
        masked if strategy.secure.addition else plan.update_format(),
    )
