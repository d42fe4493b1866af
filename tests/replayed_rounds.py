"""A federated run of real processes done again in this one, round by round, from what the service has on record.

Updates come from the agent's own engine, on the windows that the device has; the fold is that of the service. So what
a device handed in (known by its digest), what the service made of it and what it kept can be compared bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.aggregate import Arrays, Averaged, Contribution
from wearfleet_cloud.federated.fedbuff import rebased
from wearfleet_cloud.federated.privacy.central import fold
from wearfleet_cloud.service.run_context import attempt_id_for
from wearfleet_edge.trainer import Limits, PlanResult, personal_tensors, run_plan, start_state, upload_tensors
from wearfleet_edge.wearer import Wearer
from wearfleet_protos.codecs import Residual
from wearfleet_protos.recording import load_recordings
from wearfleet_protos.tensors import NO_RANK_LIMIT, Digest, decode_tensors, digest_of

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_cloud.federated.round import Receipt, Round
    from wearfleet_cloud.storage.blobs import Blobs
    from wearfleet_edge.trainer import TrainingData
    from wearfleet_protos.plan import InputContract, Plan

HOLDOUT_FRACTION = 0.5
"""Of an agent without settings."""
_LIMITS = Limits(600.0, 1e12, lambda: 0, time.monotonic, lambda: False)


def windows_of(recording: Path, contract: InputContract) -> TrainingData:
    """What an agent learns from and measures on, given this recording."""
    return Wearer(*load_recordings(recording), HOLDOUT_FRACTION).training_data(contract)


@dataclass
class Replay:
    """A run done again; ``kept`` are the tensors of each device after the rounds so far, ``ranks`` what some allow.

    Args:
        strategy: name.
        options: of the run.
        plan: of the run.
        graphs: of the plan.
        people: windows by device.
        artifacts: of the service.
    """

    strategy: str
    options: Mapping[str, object]
    plan: Plan
    graphs: Mapping[Digest, bytes]
    people: Mapping[str, TrainingData]
    artifacts: Blobs
    kept: dict[str, Arrays] = field(default_factory=dict)
    owed: dict[str, Residual] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def updates(self, done: Round) -> Iterator[tuple[Receipt, Arrays, PlanResult]]:
        """What each accepted update of a round must have been, as the service reads it; changes what devices keep.

        Raises:
            AssertionError: a device handed other bytes in.
        """
        for receipt in done.receipts:
            number = next(
                n
                for n in range(done.number, 0, -1)
                if attempt_id_for(done.run_id, n, receipt.client) == receipt.attempt
            )
            base, state = Digest(receipt.base or done.base), "" if receipt.base else done.base_state
            before, result = self._trained(receipt.client, number, self.tensors(base), self.state(state))
            plain = upload_tensors(self._without_noise, before, result.state)
            update = plain if self.plan.upload.clip else self._coded(receipt, number, plain)
            self.kept[receipt.client] = {s.name: result.state[s.name] for s in self.plan.local_specs()}
            yield receipt, update, result

    def folded(
        self, done: Round, updates: Mapping[str, tuple[Receipt, Arrays]], **changes: object
    ) -> Averaged:
        """What the service makes of these updates, with other options if wished."""
        current = self.tensors(done.base)
        contributions = []
        for receipt, sent in updates.values():
            update = sent
            if receipt.staleness:
                update = rebased(sent, self.plan.tensors, self.tensors(Digest(receipt.base)), current)
            contributions.append(
                Contribution(
                    receipt.client, receipt.num_examples, partial(_same, update), receipt.num_steps,
                    staleness=receipt.staleness,
                )
            )  # fmt: skip
        strategy = create_strategy(self.strategy, {**self.options, **changes})
        return fold(strategy, self.plan.tensors, current, self.state(done.base_state), contributions)

    def personal(self, device: str, last: Round) -> Arrays:
        """What the device must lay over its model after the personalisation that ends the run."""
        _, result = self._trained(device, last.number, self.tensors(last.base), self.state(last.base_state))
        return personal_tensors(self.plan, result.state)

    def tensors(self, digest: str) -> Arrays:
        """Global tensors of the run."""
        return decode_tensors(self.artifacts.read(Digest(digest)), self.plan.download_specs())

    def state(self, digest: str) -> Arrays:
        """What the strategy kept on the server; empty for none."""
        return decode_tensors(self.artifacts.read(Digest(digest))) if digest else {}

    def _trained(
        self, device: str, number: int, tensors: Arrays, state: Arrays
    ) -> tuple[dict[str, Any], PlanResult]:
        received = create_strategy(self.strategy, self.options).received(device, tensors, state)
        kept, limit = dict(self.kept.get(device, {})), self.ranks.get(device, NO_RANK_LIMIT)
        before = start_state(self.plan, dict(received), kept, max_lora_rank=limit)
        data = self.people[device]
        return before, run_plan(self.plan, self.graphs, before, data, round_number=number, limits=_LIMITS)

    def _coded(self, receipt: Receipt, number: int, update: Arrays) -> Arrays:
        written, owed = self.plan.update_format(), self.owed.get(receipt.client, Residual())
        encoded = written.encode(update, owed, round_number=number, client=receipt.attempt)
        assert digest_of(encoded.data) == receipt.digest, f"{receipt.client} handed in something else"
        self.owed[receipt.client] = encoded.residual
        return written.decode(encoded.data)

    @property
    def _without_noise(self) -> Plan:
        return replace(self.plan, upload=replace(self.plan.upload, clip=0.0, noise=0.0))


def _same(update: Arrays) -> Arrays:
    return update
