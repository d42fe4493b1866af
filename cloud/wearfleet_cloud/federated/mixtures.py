"""A model for each client: a mixture of everyone's, weighted by how alike clients are.

What FedAP, FedHealth 2 and EPFL share. A client trains from what it received itself, so its model is theta_j =
received_j + Delta_j; the server keeps it, and makes from all of them what each receives next. The global tensors are
the mean of what came: it is what all receive before the first mixture, and what a client does that was never seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import (
    Arrays,
    Averaged,
    Averaging,
    Contribution,
    Mean,
    check_update,
    moved,
    one_each,
    uploaded,
)
from wearfleet_cloud.federated.base import AveragingStrategy
from wearfleet_cloud.federated.client_models import ClientModels, mixed
from wearfleet_cloud.federated.client_similarity import mixture_weights
from wearfleet_cloud.federated.robust.evidence import Judgement
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = ["MIXTURE_OPTIONS", "MixtureStrategy"]

Array = NDArray[Any]

MIXTURE_OPTIONS = {
    "own_weight": "lambda: what a client's own model counts in its mixture, 0 to 1",
    "neighbours": "so many most similar clients count in a mixture; 0 for all",
    "stale_rounds": "rounds that the last model of an absent client counts for the others, >= 0",
}
"""Hyper-parameters of ``MixtureStrategy``, in words."""


@dataclass(frozen=True, slots=True)
class MixtureStrategy(AveragingStrategy, ABC):
    """One downlink for each client.

    Everything uploaded that is not of ``mixed_roles`` is a feature: sent as a value (it begins with zeros), kept for
    each client, and what ``distances`` compares.

    Args:
        own_weight: lambda, 0 to 1.
        neighbours: most similar clients that count; 0 for all.
        stale_rounds: aggregations for which the last model of an absent client counts for the others; 0 for none.
        local: training of a client.
        averaging: ``uniform`` weighs clients by their similarity alone, as the papers do; ``examples`` by their windows
            too.

    Raises:
        ConfigError: a number is out of range.
    """

    mixed_roles: ClassVar[tuple[TensorRole, ...]]

    own_weight: float = 0.5
    neighbours: int = 0
    stale_rounds: int = 20
    local: LocalTraining = field(default_factory=LocalTraining)
    averaging: Averaging = field(default_factory=lambda: Averaging("uniform"))

    def __post_init__(self) -> None:
        name = self.info.name
        if not 0.0 <= self.own_weight <= 1.0:
            raise ConfigError(f"own_weight of {name} must be 0 to 1, got {self.own_weight}")
        if self.neighbours < 0 or self.stale_rounds < 0:
            raise ConfigError(
                f"neighbours and stale_rounds of {name} must be at least 0, got {self.neighbours}, {self.stale_rounds}"
            )

    @abstractmethod
    def distances(self, features: Arrays) -> Array:
        """(N, N) distances between clients, from their features, (N, ...) each, in the order of the plan."""

    def mixtures(self, models: ClientModels) -> dict[str, Array]:
        """What every client receives next: tensor -> (N, ...)."""
        return mixed(self.weights(models), models.last)

    def common(
        self,
        models: ClientModels,  # noqa: ARG002 - all have whole tensors
        parts: Sequence[Contribution],
        combine: Callable[[Sequence[Contribution]], Mean],
    ) -> Mean:
        """The mean of what the clients of a round have, as a difference to the global tensors.

        Args:
            models: of all clients, with those of the round.
            parts: of the clients of the round, in the order of their names; each can be loaded again.
            combine: makes the mean of some of them by the operator's rule.
        """
        return combine(parts)

    def fault(self, features: Arrays) -> str:  # noqa: ARG002 - others look at them
        """Why the features that one client sent cannot be compared with others'; empty when they can.

        The service cannot see that when the update comes, and one client must not be able to end the round: it is left
        out, and what it was known by before stays.
        """
        return ""

    def mixes(self, aggregation: int) -> bool:  # noqa: ARG002 - others wait
        """Whether clients receive mixtures after this aggregation, which counts from 1."""
        return True

    def renews(self, feature: str, aggregation: int) -> bool:  # noqa: ARG002 - others keep them
        """Whether clients whose features are known take a new one at this aggregation."""
        return True

    def received(self, client: str, current: Arrays, state: Arrays) -> Arrays:
        """The client's own mixture over the global tensors; these alone as long as there is none."""
        own = ClientModels.from_state(state).own_of(client)
        return {**current, **own} if own else current

    def server(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        state: Arrays,
        contributions: Iterable[Contribution],
    ) -> Averaged:
        """Fold with theta_i <- sum_j w_ij theta_j.

        One update is in memory at a time, beside the last model and the mixture of every client.

        Raises:
            AggregationError: as ``Averaging.combine``; or no client's features can be compared.
        """
        parts, refused = self._usable(specs, contributions)
        upload = replace(self.info.upload(), roles=self.mixed_roles)
        models = self._taken_in(specs, current, ClientModels.from_state(state), parts)
        rows = models.rows(c.client for c in parts)
        differences = [
            replace(c, load=partial(_difference, models, row, current))
            for c, row in zip(parts, rows, strict=True)
        ]
        mean = self.common(models, differences, partial(self.averaging.combine, specs, upload, current))
        if self.mixes(models.aggregations):
            models = replace(models, own=self.mixtures(models))
        evidence = sorted((*mean.evidence, *refused), key=lambda judgement: judgement.client)
        return Averaged(
            moved(current, mean, upload), replace(mean, evidence=tuple(evidence)), models.to_state()
        )

    def weights(self, models: ClientModels) -> Array:
        """(N, N) W of the mixtures after an aggregation; rows sum to 1."""
        counts = models.examples if self.averaging.weighting == "examples" else np.ones(len(models.clients))
        recent = models.aggregations - models.seen <= self.stale_rounds
        distances = self.distances(models.features)
        return mixture_weights(distances, self.own_weight, counts * recent, neighbours=self.neighbours)

    def _usable(
        self, specs: Sequence[TensorSpec], contributions: Iterable[Contribution]
    ) -> tuple[list[Contribution], list[Judgement]]:
        """Contributions in the order of their clients, and who is left out."""
        wanted = uploaded(specs, self.info.upload())
        features = [spec.name for spec in wanted if spec.role not in self.mixed_roles]
        usable, refused = list[Contribution](), list[Judgement]()
        for part in one_each(contributions):
            update = part.load()
            check_update(update, wanted, client=part.client)
            fault = self.fault({name: update[name] for name in features})
            if fault:
                reason = f"update of client {part.client} refused: {fault}"
                refused.append(Judgement(part.client, "refused", reason, suspect=True))
            else:
                usable.append(part)
        if not usable:
            raise AggregationError(refused[0].reason)
        return usable, refused

    def _taken_in(
        self,
        specs: Sequence[TensorSpec],
        current: Arrays,
        models: ClientModels,
        parts: Sequence[Contribution],
    ) -> ClientModels:
        """The clients' models and features with those of a round in place of their last ones."""
        wanted = uploaded(specs, self.info.upload())
        known = set(models.clients)
        after = models.with_clients(c.client for c in parts)
        after = replace(after, aggregations=models.aggregations + 1)
        last, features = dict[str, Array](), dict[str, Array]()
        for spec in wanted:
            kept, rows = (after.last, last) if spec.role in self.mixed_roles else (after.features, features)
            zeros = np.zeros((len(after.clients), *spec.shape), spec.dtype)
            rows[spec.name] = kept.get(spec.name, zeros)
        for part, row in zip(parts, after.rows(c.client for c in parts), strict=True):
            update = part.load()
            start: dict[str, Array] = {**current, **models.own_of(part.client)}
            for name in last:
                last[name][row] = start[name] + update[name]
            for name in features:
                if part.client not in known or self.renews(name, after.aggregations):
                    features[name][row] = update[name]
            after.examples[row], after.seen[row] = part.num_examples, after.aggregations
        return replace(after, last=last, features=features)


def _difference(models: ClientModels, row: int, current: Arrays) -> Arrays:
    """What a client has, as a difference to the global tensors."""
    return {name: np.asarray(array[row] - current[name]) for name, array in models.last.items()}
