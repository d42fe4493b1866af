"""EPFL: low-rank factors A are mixed for each client by how alike the clients' factors B are; B and head stay there.

Source: FHBench's EPFL, arXiv:2504.10817; specs/federated.md section 9.
Differs: low-rank layers are found by their role (the authors' audio variant looks for names that its library does not
use and exchanges nothing), and their A is mixed for every kind of data (their time-series variant averages it);
a client sends a random projection of each column of B, not B; distances of 0 are guarded; absent clients count with
their last factors; no dropout before A.
Ranks: the network has R; a device may use fewer (r_i, ``factor_masks``). Two are compared over the columns that both
have, and row k of A is mixed and averaged over the clients that have it (``factor_ranks``). The scale alpha / R is the
network's, whatever a client's rank: a column then means the same to all. What is sent has the shapes of R.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole

from wearfleet_cloud.federated.aggregate import Arrays, Contribution, Mean
from wearfleet_cloud.federated.base import StrategyInfo
from wearfleet_cloud.federated.client_models import ClientModels
from wearfleet_cloud.federated.factor_ranks import (
    RANK,
    column_distances,
    mean_of_rows,
    mixed_rows,
    rank_fault,
)
from wearfleet_cloud.federated.mixtures import MIXTURE_OPTIONS, MixtureStrategy

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier

    from wearfleet_cloud.federated.client_program import ClientProgram

__all__ = ["EPFL"]

_LAYERS: Final = ("all", "first", "second")
_TRAINED: Final = (TensorRole.LORA_A, TensorRole.LORA_B, TensorRole.HEAD)


@dataclass(frozen=True, slots=True)
class EPFL(MixtureStrategy):
    """Personal mixtures of low-rank factors on a frozen Transformer.

    Args:
        rank: R of the factors, at least 1; a device may use fewer.
        layers: whose B are compared: ``all``, or the ``first`` or ``second`` half of them.

    Raises:
        ConfigError: an option is out of range.
    """

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="epfl",
        paper="FHBench 2025, arXiv:2504.10817",
        version=2,
        uploaded=(TensorRole.LORA_A, TensorRole.AUX),
        kept_local=(TensorRole.LORA_B, TensorRole.HEAD),
        phases=("evaluate_before", "train", "sketch", "evaluate_after"),
        composes_with=("compression", "partial_participation"),
        hyper_parameters={
            **MIXTURE_OPTIONS,
            "rank": "of the low-rank factors of queries and values, >= 1; a device may use fewer",
            "layers": "whose factors B are compared: all, first or second (half of them)",
        },
        uploaded_groups=(TensorGroup.PARAM, TensorGroup.BUFFER, TensorGroup.AUX),
        own_downlinks=True,
    )
    mixed_roles: ClassVar[tuple[TensorRole, ...]] = (TensorRole.LORA_A,)

    rank: int = 4
    layers: str = "all"

    def __post_init__(self) -> None:
        MixtureStrategy.__post_init__(self)
        if self.rank < 1:
            raise ConfigError(f"rank of EPFL must be at least 1, got {self.rank}")
        if self.layers not in _LAYERS:
            raise ConfigError(f"layers of EPFL must be {', '.join(_LAYERS)}, got {self.layers!r}")

    def network(self, model: "Classifier", seed: int) -> "Classifier":
        """The model with low-rank factors on a frozen backbone; the same A for all clients, B zero.

        Raises:
            ConfigError: it is no transformer.
        """
        from wearfleet_models.classifier import derived  # noqa: PLC0415  see AveragingStrategy

        return derived(model, seed, lora_rank=self.rank, frozen="backbone")

    def client(self, model: "Classifier") -> "ClientProgram":
        """Local epochs of A, B and head within the device's rank; then a projection of each B.

        Raises:
            ConfigError: the model has no low-rank factors of this rank, or is not frozen.
        """
        from wearfleet_cloud.federated.client_program import (  # noqa: PLC0415  see AveragingStrategy
            measured,
            model_specs,
            training_phase,
        )
        from wearfleet_cloud.federated.factor_masks import within_rank  # noqa: PLC0415
        from wearfleet_cloud.federated.factor_sketches import sketch_phase  # noqa: PLC0415

        if (model.spec.lora_rank, model.spec.frozen) != (self.rank, "backbone"):
            raise ConfigError(
                f"EPFL trains low-rank factors of rank {self.rank} on a frozen transformer; derive the model from a "
                "trained one (EPFL.network)"
            )
        train, slots = training_phase(model, self.local, roles=_TRAINED)
        sketch, specs = sketch_phase(model, self.local)
        tensors = (*model_specs(model, self.info.kept_local), *slots, *specs)
        return within_rank(measured(model, self.local, tensors, (train, sketch)))

    def distances(self, features: Arrays) -> NDArray[Any]:
        """d_ij = mean over layers of ||B_i - B_j||_F over common columns, from the projections."""
        arrays = [np.asarray(array, np.float64) for name, array in features.items() if name != RANK]
        half = (len(arrays) + 1) // 2
        chosen = {"all": arrays, "first": arrays[:half], "second": arrays[half:]}[self.layers]
        return column_distances(chosen, np.asarray(features[RANK]).astype(np.int64))

    def fault(self, features: Arrays) -> str:
        """No rank of the network."""
        return rank_fault(float(features[RANK]), self.rank)

    def mixtures(self, models: ClientModels) -> dict[str, NDArray[Any]]:
        """Row by row, over the clients that have it."""
        return mixed_rows(self.weights(models), models.last, self._ranks(models))

    def common(
        self,
        models: ClientModels,
        parts: Sequence[Contribution],
        combine: Callable[[Sequence[Contribution]], Mean],
    ) -> Mean:
        """Row by row, over the clients of the round that have it."""
        ranks = self._ranks(models)[models.rows(part.client for part in parts)]
        return mean_of_rows(combine, parts, ranks)

    def _ranks(self, models: ClientModels) -> NDArray[Any]:
        return np.asarray(models.features[RANK]).astype(np.int64)
