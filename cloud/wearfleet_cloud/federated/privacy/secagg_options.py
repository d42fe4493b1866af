"""What an operator asks of secure aggregation, and the parameters of a round that follow from it."""

import math
from dataclasses import dataclass, replace
from typing import Final

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.secagg.parameters import (
    SecureParameters,
    check_overflow,
    default_neighbours,
    default_threshold,
    largest_weight_levels,
)

from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.round_record import RoundPolicy

__all__ = ["SecureOptions"]

_FEWEST: Final = 3
"""Of two members each could subtract its own update from the sum."""


@dataclass(frozen=True, slots=True)
class SecureOptions:
    """Secure aggregation of a run; ``secagg=off`` leaves everything as it is.

    Args:
        secagg: ``on``: the service learns the weighted mean of a round's updates and nothing else of any of them.
        secagg_clip: c, every number of a difference is cut to [-c, c]; also those of normalisation statistics.
        secagg_levels: q, steps of that range: the error of a mean is below 2 c / q.
        secagg_max_examples: windows from which on all members weigh the same.
        secagg_neighbours: k, members that hold shares of one's secrets; even, 0 for about 3 log2 of the cohort.
        secagg_threshold: t, how many of them must answer; above k / 2, 0 for two thirds.
        secagg_minimum: fewest members of a cohort and of a sum, at least 3. Devices have their own minimum beside it.
        secagg_stage_s: seconds that one exchange waits for all members.

    Raises:
        ConfigError: a value is out of range, or sums of the smallest cohort could wrap.
    """

    secagg: str = "off"
    secagg_clip: float = 1.0
    secagg_levels: int = 2**16
    secagg_max_examples: int = 1000
    secagg_neighbours: int = 0
    secagg_threshold: int = 0
    secagg_minimum: int = 3
    secagg_stage_s: float = 30.0

    def __post_init__(self) -> None:
        if self.secagg not in ("on", "off"):
            raise ConfigError(f"secagg must be on or off, got {self.secagg!r}")
        if not 0.0 < self.secagg_clip < math.inf or not 0.0 < self.secagg_stage_s < math.inf:
            raise ConfigError(
                f"secagg_clip and secagg_stage_s must be above 0, got {self.secagg_clip}, {self.secagg_stage_s}"
            )
        if self.secagg_minimum < _FEWEST or self.secagg_max_examples < 1 or self.secagg_levels < 1:
            raise ConfigError(
                f"secagg_minimum must be at least {_FEWEST}, secagg_max_examples and secagg_levels at least 1, "
                f"got {self.secagg_minimum}, {self.secagg_max_examples}, {self.secagg_levels}"
            )
        if self.secagg_neighbours < 0 or self.secagg_threshold < 0:
            raise ConfigError("secagg_neighbours and secagg_threshold must be at least 0")
        self.check_cohort(self.secagg_minimum)

    @property
    def addition(self) -> str:
        """Its name in ``StrategyInfo.composes_with``; empty when it is off."""
        return "secagg" if self.secagg == "on" else ""

    def check_cohort(self, members: int) -> None:
        """The overflow law for a cohort of so many: there must be room for one weight level at least.

        Raises:
            ConfigError: sums could wrap.
        """
        check_overflow(members, 1, self.secagg_levels)

    def policies(self, cohort: CohortPolicy, policy: RoundPolicy) -> tuple[CohortPolicy, RoundPolicy]:
        """The policies of a run with at least ``secagg_minimum`` devices in a cohort and in a sum.

        Raises:
            ConfigError: cohorts are smaller than that, or so large that sums could wrap.
        """
        if not self.addition:
            return cohort, policy
        if 0 < cohort.cohort_size < self.secagg_minimum:
            raise ConfigError(
                f"cohorts of {cohort.cohort_size} are too small for secure aggregation, {self.secagg_minimum} are "
                "needed (secagg_minimum)"
            )
        self.check_cohort(math.ceil(cohort.cohort_size * cohort.over_selection))
        least = self.secagg_minimum
        return (
            replace(cohort, min_connected=max(cohort.min_connected, least)),
            replace(policy, quorum=max(policy.quorum, least)),
        )

    def parameters(
        self,
        run_id: str,
        round_number: int,
        members: tuple[str, ...],
        *,
        size: int,
        uniform: bool,
        graph_seed: int,
    ) -> SecureParameters:
        """What the service proposes for a round.

        Args:
            run_id: the run.
            round_number: its round.
            members: the cohort.
            size: P, numbers of an update.
            uniform: all members weigh the same.
            graph_seed: of the graph of neighbours, fresh.

        Raises:
            ConfigError: sums could wrap.
            ProtocolError: neighbours or threshold do not fit this cohort.
        """
        self.check_cohort(len(members))
        neighbours = min(self.secagg_neighbours or default_neighbours(len(members)), len(members) - 1)
        room = largest_weight_levels(len(members), self.secagg_levels)
        return SecureParameters(
            run_id=run_id,
            round=round_number,
            members=tuple(sorted(members)),
            neighbours=neighbours,
            threshold=self.secagg_threshold or default_threshold(neighbours),
            clip=self.secagg_clip,
            levels=self.secagg_levels,
            weight_levels=1 if uniform else min(self.secagg_max_examples, room),
            max_examples=self.secagg_max_examples,
            size=size,
            graph_seed=graph_seed,
        )
