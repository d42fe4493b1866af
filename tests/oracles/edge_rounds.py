"""Rounds of a federation in one process: plans on the device's own engine, the strategy's own fold, no network."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from oracles.compiled import compiled_plan
from oracles.small_federation import arrays
from wearfleet_cloud.federated.aggregate import Arrays, Contribution
from wearfleet_cloud.federated.base import Strategy
from wearfleet_edge.trainer import Limits, PlanResult, TrainingData, run_plan, start_state, upload_tensors
from wearfleet_models.classifier import Classifier
from wearfleet_protos.tensors import NO_RANK_LIMIT
from wearfleet_protos.windowing import LabelledWindows

SEED = 7
LIMITS = Limits(600.0, 1e12, lambda: 0, time.monotonic, lambda: False)
Split = Mapping[str, LabelledWindows]


@dataclass
class Federation:
    """A strategy over some clients; ``round`` changes ``tensors``, ``state`` and ``local``.

    A client in ``lost`` trains, but its update is not accepted: it keeps what it had. ``ranks`` are the highest ranks
    that clients allow; the others have no limit.
    """

    strategy: Strategy
    network: Classifier
    clients: Mapping[str, Split]
    tensors: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)
    local: dict[str, Arrays] = field(default_factory=dict)
    number: int = 0
    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan, self.graphs = compiled_plan(self.strategy, self.network, seed=SEED)
        known = arrays(self.network)
        self.tensors = {
            s.name: known.get(s.name, np.zeros(s.shape, s.dtype)) for s in self.plan.download_specs()
        }

    def round(self, members: Iterable[str] = (), lost: Iterable[str] = ()) -> dict[str, PlanResult]:
        """One round of some clients (all of them by default)."""
        self.number += 1
        results = {name: self.client(name) for name in members or self.clients}
        updates = []
        for name, (result, update) in results.items():
            if name in lost:
                continue
            updates.append(
                Contribution(name, result.num_examples, partial(lambda u: u, update), result.num_steps)
            )
            self.local[name] = {spec.name: result.state[spec.name] for spec in self.plan.local_specs()}
        folded = self.strategy.server(self.plan.tensors, self.tensors, self.state, updates)
        self.tensors, self.state = folded.tensors, folded.state
        return {name: result for name, (result, _) in results.items()}

    def client(self, name: str) -> tuple[PlanResult, Arrays]:
        """One client's part, from what the server and the device have."""
        received = self.strategy.received(name, self.tensors, self.state)
        limit = self.ranks.get(name, NO_RANK_LIMIT)
        kept = dict(self.local.get(name, {}))
        before = start_state(self.plan, dict(received), kept, max_lora_rank=limit)
        data = TrainingData(self.clients[name]["train"], self.clients[name]["holdout"])
        result = run_plan(self.plan, self.graphs, before, data, round_number=self.number, limits=LIMITS)
        return result, upload_tensors(self.plan, before, result.state)
