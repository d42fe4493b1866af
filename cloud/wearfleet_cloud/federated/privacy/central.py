"""Central differential privacy: the server clips every client's difference and adds noise once to their sum.

The unit is a client: with or without what one client sent in a round, the sum moves by at most the clip C. So it takes
N(0, (z C)^2) in every coordinate, in float64, from a generator that the operating system seeds. What is divided by is
fixed beforehand; a count of those who came would depend on them. Weights by examples are left out for the same reason.

Source: McMahan et al. 2018, arXiv:1710.06963, algorithm 1 (fixed denominator); Andrew et al. 2021, arXiv:1905.03871,
algorithm 1 (adaptive clip); specs/federated.md section 18.
Differs: the noise is drawn as floating-point numbers, whose gaps are no secret (Mironov 2012): epsilon holds for a
reader who does not exploit the last bits.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.plan import Plan, UploadSpec
from wearfleet_protos.privacy import clipped, joint_norm, secret_generator
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Averaging, Contribution, Mean, weighted_mean
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.privacy.accounting import require_library
from wearfleet_cloud.federated.privacy.options import PrivacyOptions
from wearfleet_cloud.federated.privacy.record import check_record
from wearfleet_cloud.federated.robust.fold import fold_robustly

__all__ = ["ClippedMean", "check_plan", "check_private", "check_upload", "fold", "next_clip"]

_CLIP: Final = "privacy/clip"
_ROUNDS: Final = "privacy/rounds"
_QUANTILE: Final = 0.5
_CLIP_RATE: Final = 0.2
"""gamma and eta_C of Andrew et al., section 3."""


def fold(
    strategy: Strategy,
    specs: Sequence[TensorSpec],
    current: Arrays,
    state: Arrays,
    contributions: Iterable[Contribution],
    *,
    generator: np.random.Generator | None = None,
) -> Averaged:
    """``Strategy.server`` under the privacy or the robust rule of a strategy: how every caller folds updates.

    Args:
        strategy: with its options.
        specs: ``Plan.tensors``.
        current: global tensors that the clients started from.
        state: what the last fold left: the strategy's own, and beside it the number of noised rounds and, if it
            adapts, the clip.
        contributions: any order.
        generator: of the noise; None for one that is seeded by the operating system. A simulation gives its own, so
            that it can be repeated: what it makes is not private.

    Raises:
        AggregationError: as ``Strategy.server``.
    """
    options = strategy.privacy
    if options.dp == "local":  # devices keep their numbers of windows to themselves
        strategy = strategy.averaged_by(replace(strategy.averaging, weighting="uniform"))
    if options.dp != "central":
        return fold_robustly(strategy, specs, current, state, contributions)
    source = secret_generator() if generator is None else generator
    clip = float(state.get(_CLIP, np.float64(options.clip)))
    mechanism = ClippedMean("uniform", options=options, clip=clip, generator=source)
    own = {name: array for name, array in state.items() if name not in (_CLIP, _ROUNDS)}
    averaged = strategy.averaged_by(mechanism).server(specs, current, own, contributions)
    spent = {_ROUNDS: np.asarray(state.get(_ROUNDS, np.int64(0)) + 1, np.int64)}
    moved = {_CLIP: np.asarray(mechanism.clip_after())} if options.adaptive_clip == "on" else {}
    return replace(averaged, state={**averaged.state, **spent, **moved})


@dataclass(frozen=True, slots=True)
class ClippedMean(Averaging):
    """The noised mean of clipped updates; made afresh for each round.

    Args:
        options: noise and denominator.
        clip: C of this round.
        generator: of the noise.
        fits: filled while folding: for each update whether its norm was within the clip.
    """

    options: PrivacyOptions = field(default_factory=PrivacyOptions)
    clip: float = math.inf
    generator: np.random.Generator = field(default_factory=np.random.default_rng)
    fits: list[bool] = field(default_factory=list)

    def combine(
        self,
        specs: Sequence[TensorSpec],
        upload: UploadSpec,
        current: Arrays,
        contributions: Iterable[Contribution],
    ) -> Mean:
        """(sum_i clipped update_i + noise) / expected cohort.

        Raises:
            AggregationError: statistics of normalisation or counters are uploaded, or as ``weighted_mean``.
        """
        try:
            check_upload(specs, upload)
        except ConfigError as error:
            raise AggregationError(str(error)) from error
        mean = weighted_mean(specs, upload, current, [self._clipped(c) for c in contributions], self)
        share = len(mean.clients) / self.options.expected_cohort
        noise = self.options.sum_noise
        deviation = noise * self.clip / self.options.expected_cohort if noise else 0.0
        return replace(mean, values={n: self._noised(v, share, deviation) for n, v in mean.values.items()})

    def clip_after(self) -> float:
        """C of the next round, adapted."""
        noise = self.generator.normal(0.0, self.options.bit_noise) if self.options.bit_noise else 0.0
        return next_clip(self.clip, self.fits, noise, self.options.expected_cohort)

    def _clipped(self, contribution: Contribution) -> Contribution:
        def load() -> Arrays:
            update = contribution.load()
            norm = contribution.scale * joint_norm(update)
            self.fits.append(norm <= self.clip)
            return clipped(update, norm, self.clip)

        return replace(contribution, load=load)

    def _noised(self, value: NDArray[Any], share: float, deviation: float) -> NDArray[Any]:
        scaled = value if share == 1.0 else value * share
        return scaled + self.generator.normal(0.0, deviation, value.shape) if deviation else scaled


def next_clip(clip: float, fits: Sequence[bool], noise: float, expected_cohort: int) -> float:
    """C exp(-eta (b - gamma)), b the noised share of updates that were *not* clipped.

    The bits are counted from 1/2, which halves what one client can change and makes clients that did not come neutral.

    Args:
        clip: C of this round.
        fits: for each update whether its norm was within the clip.
        noise: in the sum of the bits.
        expected_cohort: divisor.
    """
    share = (sum(bit - 0.5 for bit in fits) + noise) / expected_cohort + 0.5
    return clip * math.exp(-_CLIP_RATE * (share - _QUANTILE))


def check_private(strategy: Strategy, specs: Sequence[TensorSpec]) -> None:
    """Refuse a job that its privacy cannot protect, or whose cost could not be told, before it starts.

    Args:
        strategy: with its options.
        specs: of its client program, or of its plan.

    Raises:
        ConfigError: as :func:`check_upload`; or the library for accounting is missing.
    """
    if strategy.privacy.dp == "off":
        return
    require_library()
    if (
        strategy.privacy.dp != "record"
    ):  # its noise is in the steps, and statistics of normalisation do not change
        check_upload(specs, strategy.info.upload())


def check_plan(strategy: Strategy, plan: Plan) -> None:
    """Refuse a plan whose devices would not do what the run's ledger counts on.

    Args:
        strategy: with the run's options.
        plan: what devices will get.

    Raises:
        ConfigError: clip or noise of the plan are not those of the options, or as :func:`check_private` and
            ``record.check_record``.
    """
    check_private(strategy, plan.tensors)
    check_record(plan, strategy.privacy.record)
    has = plan.upload.clip, plan.upload.noise
    needs = strategy.privacy.device_clip, strategy.privacy.device_noise
    if has != needs:
        raise ConfigError(
            f"the plan lets devices clip to {has[0]:g} and add noise of {has[1]:g}, the options of the run ask for "
            f"{needs[0]:g} and {needs[1]:g}; build the plan with the same --set"
        )


def check_upload(specs: Sequence[TensorSpec], upload: UploadSpec) -> None:
    """Refuse a plan whose updates hold what cannot be noised.

    Raises:
        ConfigError: statistics of normalisation or counters are uploaded, or nothing is.
    """
    sent = [s for s in specs if s.role in upload.roles and s.group in upload.groups]
    kept: Mapping[TensorRole, str] = {
        TensorRole.NORM_STAT: "statistics of normalisation (noise would make a variance negative)",
        TensorRole.COUNTER: "counters (the largest of them is one client's)",
    }
    for spec in sent:
        if spec.role in kept:
            raise ConfigError(
                f"clip and noise cannot protect {kept[spec.role]}, and {spec.name} is uploaded; take fedbn, which "
                "keeps them on the device, or a backbone without batch normalisation (cnn-plain, transformer)"
            )
    if not sent:
        raise ConfigError("clip and noise protect updates, and this strategy uploads nothing")
