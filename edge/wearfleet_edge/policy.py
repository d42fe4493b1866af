"""What may leave the device, and in what plans it takes part. The wearer's settings decide; the cloud cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import DeniedError
from wearfleet_protos.privacy import gaussian_epsilon

if TYPE_CHECKING:
    from wearfleet_protos.plan import Plan

    from wearfleet_edge.config import FederationConfig, PolicyConfig

__all__ = ["PlanDemands", "SharingPolicy", "plan_demands", "require_demands", "sharing_policy"]

_DELTA: Final = 1e-5


@dataclass(frozen=True, slots=True)
class SharingPolicy:
    """Decisions on each kind of data.

    Args:
        raw_windows: sensor samples may be sent.
        annotations: stated activities may be sent.
    """

    raw_windows: bool
    annotations: bool


def sharing_policy(config: PolicyConfig) -> SharingPolicy:
    """The policy that the settings ask for."""
    return SharingPolicy(raw_windows=config.share_raw_windows, annotations=config.share_annotations)


@dataclass(frozen=True, slots=True)
class PlanDemands:
    """What a plan must fulfil before this device runs it.

    Args:
        max_epsilon: largest epsilon of one round, at delta 1e-5, against everybody who sees what the device sends;
            inf asks for no noise.
        strategies: names of the strategies it takes part in; empty for all.
    """

    max_epsilon: float = math.inf
    strategies: frozenset[str] = frozenset()


def plan_demands(config: FederationConfig) -> PlanDemands:
    """The demands that the settings make."""
    names = (name.strip() for name in config.strategies.split(","))
    return PlanDemands(config.max_epsilon, frozenset(name for name in names if name))


def require_demands(demands: PlanDemands, plan: Plan, *, uploads: bool) -> None:
    """Refuse a plan that is weaker than this device allows.

    Args:
        demands: of the device.
        plan: the plan; what it says of clip and noise is what the device will do.
        uploads: False for a task whose result stays here.

    Raises:
        DeniedError: says what was asked for and what the plan gives.
    """
    if demands.strategies and plan.strategy not in demands.strategies:
        raise DeniedError(
            f"strategy {plan.strategy} is not among those of federation.strategies: "
            f"{', '.join(sorted(demands.strategies))}"
        )
    if not uploads or not plan.upload_specs() or math.isinf(demands.max_epsilon):
        return
    upload = plan.upload
    given = gaussian_epsilon(upload.noise / (2.0 * upload.clip), _DELTA) if upload.clip else math.inf
    if given > demands.max_epsilon:
        raise DeniedError(
            f"a round of this plan costs epsilon {given:.3g} at delta {_DELTA:g} (clip {upload.clip:g}, noise "
            f"{upload.noise:g}), federation.max_epsilon allows {demands.max_epsilon:g}"
        )
