"""Plans of the small problem, compiled once: a compilation takes longer than most of what tests do with its plan."""

from collections.abc import Hashable

from oracles.small_federation import CONTRACT
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_models.classifier import Classifier
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import Digest

_PLANS: dict[Hashable, tuple[Plan, dict[Digest, bytes]]] = {}


def compiled_plan(
    strategy: Strategy, network: Classifier, *, plan_id: str = "p", seed: int = 0
) -> tuple[Plan, dict[Digest, bytes]]:
    """As ``build_plan`` with the small contract; equal strategies, networks and seeds share what it gives."""
    values = tuple((name, tensor.numpy().tobytes()) for name, tensor in network.state_dict().items())
    key = (repr(strategy), repr(network), network.spec, hash(values), plan_id, seed)
    if key not in _PLANS:
        _PLANS[key] = build_plan(strategy, network, CONTRACT, plan_id=plan_id, seed=seed)
    plan, graphs = _PLANS[key]
    return plan, dict(graphs)
