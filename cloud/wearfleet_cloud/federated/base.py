"""What a federated strategy is: a client program above, a server fold below."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, Self

from wearfleet_protos.plan import UploadSpec
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, moved
from wearfleet_cloud.federated.cohort import Buffering
from wearfleet_cloud.federated.compression import Compression
from wearfleet_cloud.federated.downlink import Downlink
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.privacy.secagg_options import SecureOptions
from wearfleet_cloud.federated.training_options import LocalTraining

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["ADDITIONS", "LEARNED_ROLES", "AveragingStrategy", "Strategy", "StrategyInfo"]

LEARNED_ROLES = (
    TensorRole.SHARED,
    TensorRole.HEAD,
    TensorRole.NORM_AFFINE,
    TensorRole.NORM_STAT,
    TensorRole.COUNTER,
)
"""Everything that training changes in the models of this stage."""

_MEASURED: Final = ("evaluate_before", "train", "evaluate_after")

ADDITIONS: Final = (
    "secagg",
    "central_dp",
    "local_dp",
    "record_dp",
    "robust",
    "compression",
    "downlink",
    "async",
    "partial_participation",
)
"""What a strategy can be combined with; specs/federated.md section 21."""


@dataclass(frozen=True, slots=True)
class StrategyInfo:
    """What people, the plan and the scheduler need to know of a strategy.

    Args:
        name: key in ``STRATEGIES``.
        paper: short citation.
        version: raised when the numbers change.
        uploaded: roles sent to the server after a round.
        kept_local: roles that stay on the device from round to round.
        phases: what a client does in a round, in order.
        composes_with: additions whose combination with it is sound (specs/federated.md section 21).
        hyper_parameters: its own, beside those of local training, with their meaning.
        kept_beside: what else stays on the device from round to round, in words.
        uploaded_groups: of the uploaded tensors.
        names_cohort: whether ``Strategy.cohort`` says who takes part; False leaves that to the operator's policy.
        own_downlinks: whether ``Strategy.received`` makes a model for each client; False sends all the same.
    """

    name: str
    paper: str
    version: int = 1
    uploaded: tuple[TensorRole, ...] = LEARNED_ROLES
    kept_local: tuple[TensorRole, ...] = ()
    phases: tuple[str, ...] = _MEASURED
    composes_with: tuple[str, ...] = ADDITIONS
    hyper_parameters: Mapping[str, str] = field(default_factory=dict)
    kept_beside: tuple[str, ...] = ()
    uploaded_groups: tuple[TensorGroup, ...] = (TensorGroup.PARAM, TensorGroup.BUFFER)
    names_cohort: bool = False
    own_downlinks: bool = False

    def upload(self) -> UploadSpec:
        """The upload as the plan states it, but for its codec: differences."""
        return UploadSpec(self.uploaded, self.uploaded_groups, "delta")


class Strategy(Protocol):
    """One federated algorithm with its hyper-parameters."""

    info: ClassVar[StrategyInfo]

    @property
    def local(self) -> LocalTraining:
        """Local training of a client."""

    @property
    def averaging(self) -> Averaging:
        """How updates are combined."""

    @property
    def buffering(self) -> Buffering | None:
        """How asynchronous updates are collected; None: in synchronous rounds."""

    @property
    def compression(self) -> Compression:
        """How updates are coded."""

    @property
    def downlink(self) -> Downlink:
        """How global tensors are sent."""

    @property
    def privacy(self) -> PrivacyOptions:
        """What is clipped and noised; ``privacy.central.fold`` applies it around :meth:`server`."""

    @property
    def secure(self) -> SecureOptions:
        """Whether only the sum of a round's updates can be read; :meth:`server` then gets it as one contribution."""

    def averaged_by(self, averaging: Averaging) -> Self:
        """The same strategy with another rule for combining updates."""

    def network(self, model: "Classifier", seed: int) -> "Classifier":
        """The network that is trained, made from another; the same, unless the strategy adds layers or freezes some.

        Args:
            model: trained before, or with first weights.
            seed: of the weights of added layers.

        Raises:
            ConfigError: the strategy makes no sense for this model.
        """

    def client(self, model: "Classifier") -> "ClientProgram":
        """The client's side for this model.

        Raises:
            ConfigError: the strategy makes no sense for this model.
        """

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold the updates of a round into the global tensors.

        Args:
            specs: ``Plan.tensors``.
            current: global tensors that the clients started from.
            state: what the last aggregation left in ``Averaged.state``; empty before the first one. A round that is
                skipped leaves it as it was.
            contributions: any order.

        Raises:
            AggregationError: see ``Averaging.combine``.
        """

    def cohort(self, eligible: Sequence[str], round_number: int, state: Arrays) -> tuple[str, ...] | None:
        """Who takes part in a round, if the strategy decides that; None leaves it to the operator's policy.

        Args:
            eligible: clients that could.
            round_number: from 1, skipped rounds counted.
            state: what the last aggregation left.
        """

    def received(self, client: str, current: Arrays, state: Arrays) -> Arrays:
        """What a client gets at the start of a round: ``current``, unless the strategy makes a model for each client.

        Args:
            client: its name.
            current: global tensors.
            state: what the last aggregation left.
        """


@dataclass(frozen=True, slots=True)
class AveragingStrategy:
    """Implements :class:`Strategy`: local epochs, then the mean of what was uploaded. Others derive from it.

    Its fields are the parts whose options every strategy has. A part that is an addition says so in its property
    ``addition`` (``composition.Addition``).

    Args:
        local: training of a client.
        averaging: how updates are combined.
        privacy: what is clipped and noised.
        secure: whether updates are summed under masks.
        compression: how updates are coded.
        downlink: how global tensors are sent.
    """

    info: ClassVar[StrategyInfo]
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=Averaging)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    secure: SecureOptions = field(default_factory=SecureOptions)
    compression: Compression = field(default_factory=Compression)
    downlink: Downlink = field(default_factory=Downlink)

    @property
    def buffering(self) -> Buffering | None:
        """None: in synchronous rounds."""
        return None

    def averaged_by(self, averaging: Averaging) -> Self:
        """As ``Strategy.averaged_by``."""
        return replace(self, averaging=averaging)

    def network(self, model: "Classifier", seed: int) -> "Classifier":  # noqa: ARG002 - nothing is added
        """The model itself."""
        return model

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs on the cross-entropy; what ``info`` keeps local begins where the last round ended."""
        from wearfleet_cloud.federated.client_program import local_program  # noqa: PLC0415  folding needs no torch

        return local_program(model, self.local, keep_local=self.info.kept_local)

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,  # noqa: ARG002 - it keeps nothing
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """The mean of what the clients have; what is not uploaded stays as it was in the global model."""
        upload = self.info.upload()
        mean = self.averaging.combine(specs, upload, current, contributions)
        return Averaged(moved(current, mean, upload), mean)

    def cohort(
        self,
        eligible: Sequence[str],  # noqa: ARG002 - the operator decides
        round_number: int,  # noqa: ARG002
        state: Arrays,  # noqa: ARG002
    ) -> tuple[str, ...] | None:
        """The operator's policy decides."""
        return None

    def received(self, client: str, current: Arrays, state: Arrays) -> Arrays:  # noqa: ARG002 - the same for all
        """The global tensors."""
        return current
