"""A turn of the ring as tensors: from what the ring sends a site to the start of the site's run, and back. Pure.

The site stands in for a device: what a device's plan would do to its state, the site's run does.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from wearfleet_protos.batching import rng_key
from wearfleet_protos.errors import AggregationError, DeniedError, IntegrityError, ShapeError
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import TensorGroup, TensorSpec, check_finite, check_tensors

from wearfleet_cloud.federated.aggregate import Arrays, check_variances, statistic_pairs
from wearfleet_cloud.federated.metafed import SENT
from wearfleet_cloud.federated.metafed_site import TURNS
from wearfleet_cloud.federated.teachers import GOOD, STAGE, TEACHER, learned_by

__all__ = ["check_teacher", "closing", "opening", "plan_of_turn"]

_RING: Final = "metafed"
_SITE: Final = "metafed-site"
_STREAM: Final = 0x51E


def plan_of_turn(ring: Plan, site: Plan, attempt: str, round_number: int) -> Plan:
    """The site's plan for one turn: with the turn's name, and shuffles of its own.

    Raises:
        IntegrityError: the plans are not for one model, or not MetaFed's.
    """
    if (ring.strategy, site.strategy) != (_RING, _SITE):
        raise IntegrityError(
            f"expected a ring of {_RING} and a site's plan of {_SITE}, got {ring.strategy} and {site.strategy}"
        )
    if ring.model_schema_hash != site.model_schema_hash or ring.contract != site.contract:
        raise IntegrityError(
            f"the ring trains another model ({ring.model_schema_hash}) than the site's plan "
            f"({site.model_schema_hash}); build the plan from the ring's model"
        )
    seed = rng_key(site.seed, round_number, _STREAM, 0)
    return replace(site, plan_id=f"turn-{attempt}", seed=seed)


def check_teacher(before: Arrays, ring: Plan) -> None:
    """Refuse a teacher that no site may take over: wrong tensors, not finite, or a negative variance.

    Args:
        before: the state that the turn starts from.
        ring: the ring's plan.

    Raises:
        IntegrityError: says which tensor is wrong.
    """
    learned = learned_by(ring.tensors)
    theirs = {s.name: before[TEACHER + s.name] for s in learned if TEACHER + s.name in before}
    try:
        check_tensors(theirs, learned)
        check_finite(theirs)
        check_variances("before this one", theirs, {}, statistic_pairs(learned))
    except (ShapeError, AggregationError) as error:
        raise IntegrityError(f"the teacher is refused: {error}") from error


def opening(before: Arrays, site: Plan, *, personal: bool) -> dict[str, np.ndarray]:
    """Start values of the site's run.

    Args:
        before: the state that the turn starts from, of the ring's plan: the site's model, whether it was good enough,
            the teacher and the stage.
        site: plan of the site's run.
        personal: the last stage, even if the ring ended early.
    """
    stage = float(before[STAGE])
    given = {**before, STAGE: np.asarray(2.0 if personal and stage > 0.5 else stage, np.float32)}
    return {spec.name: _value(spec, given) for spec in site.download_specs()}


def closing(before: Arrays, made: Arrays, ring: Plan) -> dict[str, np.ndarray]:
    """The state that the turn leaves behind, of the ring's plan.

    Args:
        before: as for :func:`opening`.
        made: global tensors that the site's run ended with.
        ring: the ring's plan.

    Raises:
        DeniedError: the run ended before the turn was over.
    """
    if float(made[TURNS]) < 0.5:
        raise DeniedError("the site's run ended before its turn was over: too few of its devices took part")
    after: Mapping[str, np.ndarray] = {**before, **{s.name: made[s.name] for s in _model(ring)}}
    sent = {SENT + s.name: np.array(made[s.name]) for s in learned_by(ring.tensors)}
    return {**after, **sent, GOOD: np.asarray(made[GOOD])}


def _model(plan: Plan) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in plan.tensors if spec.group in (TensorGroup.PARAM, TensorGroup.BUFFER))


def _value(spec: TensorSpec, given: Arrays) -> np.ndarray:
    return np.asarray(given.get(spec.name, np.zeros(spec.shape, spec.dtype)), spec.dtype)
