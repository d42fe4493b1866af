"""Record-level privacy of a plan: its noised steps are those that the ledger counts on, and nothing goes round them.

A tensor is *bare* when it depends on the wearer's windows otherwise than through noised steps. Nothing bare may be
uploaded, nor steer what is.
"""

from collections.abc import Sequence

from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Phase, Plan

from wearfleet_cloud.federated.privacy.options import RECORD_CLIP, RECORD_SIGMA, RecordPrivacy

__all__ = ["bare_tensors", "check_record"]


def check_record(plan: Plan, record: RecordPrivacy | None) -> None:
    """Refuse a plan that protects single windows otherwise than the options say, or not at all.

    Args:
        plan: what devices will get.
        record: of the run's options; None where single windows are not protected.

    Raises:
        ConfigError: other steps, noise or sampling than the options'; or what is uploaded is bare.
    """
    has = [_said(phase) for phase in plan.phases if phase.loop.sampling_rate]
    needs = [] if record is None else [record]
    if has != needs:
        raise ConfigError(
            f"the noised steps of the plan are {_shown(has)}, the options of the run ask for {_shown(needs)}; build "
            "the plan with the same --set"
        )
    if record is None:
        return
    bare = bare_tensors(plan)
    sent = [spec.name for spec in plan.upload_specs()]
    leak = next((name for name in sent if name in bare), None)
    if leak is not None:
        raise ConfigError(
            f"{leak} is uploaded and depends on windows otherwise than through noised steps, so dp=record does not "
            "protect them; take fedavg, fedbn or ditto"
        )
    if not sent:
        raise ConfigError("dp=record protects windows in updates, and this strategy uploads nothing")


def bare_tensors(plan: Plan) -> frozenset[str]:
    """Names of the state tensors that depend on windows otherwise than through noised steps, in any round.

    What a device keeps from round to round is bare in all once it is in one; a copy of it is bare from the start.
    """
    bare: set[str] = set()
    kept = {spec.name for spec in plan.tensors if spec.origin == "local"}
    while True:
        before = len(bare)
        bare |= {spec.name for spec in plan.tensors if spec.copy_of in bare & kept}
        for phase in plan.phases:
            if _is_bare(phase, bare):
                bare |= {output.target for output in phase.outputs if output.kind == "state"}
        if len(bare) == before:
            return frozenset(bare)


def _is_bare(phase: Phase, bare: set[str]) -> bool:
    """Whether what a phase writes is: it reads something bare, or windows without noise."""
    read = {b.source for b in phase.inputs if b.kind == "state"} | {phase.when}
    seen = {b.source for b in phase.inputs if b.kind == "batch"} & {"x", "y"}
    return bool(read & bare) or (bool(seen) and not phase.loop.sampling_rate)


def _said(phase: Phase) -> RecordPrivacy:
    scalars = dict(phase.scalars)
    return RecordPrivacy(
        scalars.get(RECORD_CLIP, 0.0),
        scalars.get(RECORD_SIGMA, 0.0),
        phase.loop.sampling_rate,
        phase.loop.max_steps,
    )


def _shown(parts: Sequence[RecordPrivacy]) -> str:
    return (
        " and ".join(
            f"{p.steps} of rate {p.sampling_rate:g} with clip {p.clip:g} and noise {p.sigma:g}" for p in parts
        )
        or "none"
    )
