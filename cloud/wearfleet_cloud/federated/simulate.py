"""A federation in one process: the clients' own steps, the service's own cohorts and folds, and what came of it.

Evaluation modes are those of specs/federated.md 0.5, always named: ``global@clients`` the global model alone,
``personal@clients`` the model that each client would use after the personalisation that ends a run, ``unseen`` the
global model on clients that never took part, ``finetuned(k)`` the global model after k local epochs of SGD. A protocol
that selects (``selection_protocols``) reports ``personal@clients`` alone: it says nothing of the other modes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from wearfleet_models.classifier import Classifier
from wearfleet_protos.batching import rng_key
from wearfleet_protos.codecs import Turn
from wearfleet_protos.errors import AggregationError, ConfigError, ShapeError
from wearfleet_protos.tensors import NO_RANK_LIMIT, TensorRole, TensorSpec, check_finite

from wearfleet_cloud.data.dataset import Progress, silent
from wearfleet_cloud.federated.aggregate import Arrays, Contribution, check_update, uploaded
from wearfleet_cloud.federated.base import Strategy
from wearfleet_cloud.federated.broadcast import SimulatedDownloads, download_format, fold_broadcast
from wearfleet_cloud.federated.cohort import CohortPolicy, policies_of
from wearfleet_cloud.federated.fedavg import FedAvg
from wearfleet_cloud.federated.fedbuff import rebased
from wearfleet_cloud.federated.latency import Latency
from wearfleet_cloud.federated.privacy.central import check_private
from wearfleet_cloud.federated.privacy.secagg_simulated import MachineOf, SimulatedSums
from wearfleet_cloud.federated.robust.options import TooFewUpdatesError
from wearfleet_cloud.federated.round_record import RoundPolicy
from wearfleet_cloud.federated.selection_protocols import FHBENCH_EVERY, PROTOCOLS, accuracy_counts, selected
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import ClientRound, Kept, Runner, downloaded_specs
from wearfleet_cloud.federated.virtual_time import Counted, VirtualRound, VirtualRun

__all__ = ["Mode", "Outcome", "Population", "RoundFigures", "Simulation", "simulate"]

_EVALUATED_AT_ONCE = 1024
_LEASE_MEDIANS = 2.0
"""A lost client is given up after so many times the median latency (specs/federated.md section 20)."""
_NOISE = 0xD1F
"""Keeps the noise of privacy apart from other random numbers. It comes from the seed: a simulation protects nobody."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What is simulated.

    Args:
        rounds: at least 1; of an asynchronous strategy: buffers.
        cohort: clients a round.
        seed: of cohorts, shuffling and random numbers.
        finetune_epochs: k of ``finetuned(k)``; 0 leaves it out.
        policy: when a round has enough, in virtual time.
        latency: of the clients, in virtual time; by default all need one second.
        protocol: which round's accuracies are reported, a name of ``selection_protocols.PROTOCOLS``.

    Raises:
        ConfigError: no rounds, or an unknown protocol.
    """

    rounds: int
    cohort: CohortPolicy = field(default_factory=CohortPolicy)
    seed: int = 0
    finetune_epochs: int = 0
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    latency: Latency = field(default_factory=Latency)
    protocol: str = "last"

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.protocol == "fhbench" and self.rounds < FHBENCH_EVERY:
            raise ConfigError(f"protocol fhbench needs {FHBENCH_EVERY} rounds or more, got {self.rounds}")
        if self.rounds < 1 or self.finetune_epochs < 0:
            raise ConfigError(
                f"rounds must be at least 1 and finetune epochs at least 0, got {self.rounds}, {self.finetune_epochs}"
            )


@dataclass(frozen=True, slots=True)
class Mode:
    """Accuracies of one evaluation mode over clients.

    Args:
        mean: each client counts once.
        weighted: each window counts once.
        worst: mean of the worst tenth of the clients, at least one.
        deviation: standard deviation over the clients.
        clients: how many.
    """

    mean: float
    weighted: float
    worst: float
    deviation: float
    clients: int


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """One round.

    Args:
        number: from 1.
        clients: whose updates counted; 0 when it was skipped.
        received: mean accuracy over them of what they received (with their own tensors), on held-out windows; None
            when there are none.
        bytes_down: payload of tensors, for every task that was given, by what the client held.
        bytes_up: payload of the updates that counted.
        lost: clients that were given up.
        staleness: mean over the updates.
        virtual_s: virtual time of its end since the start of the run.
        refused: clients whose updates the service or the robust rule refused.
        suspects: clients that the robust rule found suspect, with those that it refused.
        skipped: why the robust rule made nothing of the round; empty when it did.
    """

    number: int
    clients: int
    received: float | None
    bytes_down: int
    bytes_up: int
    lost: int
    staleness: float
    virtual_s: float
    refused: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Rounds in order, modes by name, and the global tensors and server state at the end."""

    rounds: tuple[RoundFigures, ...]
    modes: Mapping[str, Mode]
    tensors: Arrays
    state: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Clients that may take part, and clients that never do."""

    clients: Sequence[SimulatedClient]
    unseen: Sequence[SimulatedClient] = ()


def simulate(
    strategy: Strategy,
    model: Classifier,
    population: Population,
    simulation: Simulation,
    runner_of: Callable[[Strategy], Runner],
    *,
    machine_of: MachineOf | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Run a federation and evaluate it in every mode that applies.

    Args:
        strategy: with its hyper-parameters.
        model: architecture and first values.
        population: its clients.
        simulation: rounds, cohorts, seed.
        runner_of: how the clients of a strategy are run.
        machine_of: makes members of secure aggregation, if it is on.
        progress: told about rounds.

    Raises:
        AggregationError: a round's average is not finite, training diverged; or a robust rule skipped every round.
        ConfigError: the strategy's privacy cannot protect what it uploads, or a client limits a rank that is not there.
    """
    population = _measured(population, simulation)
    runner = runner_of(strategy)
    check_private(strategy, runner.specs)
    _check_ranks(strategy, runner.specs, population.clients)
    clients = {client.name: client for client in population.clients}
    sums = _sums(strategy, machine_of, simulation.seed)
    downloads = SimulatedDownloads(download_format(strategy, runner.specs, simulation.seed))
    first = _first_tensors(model, runner.specs)
    downloads.publish(first, {})
    federation = _Federation(strategy, runner, clients, simulation, sums, downloads, first)
    run = _virtual_run(strategy, population, simulation)
    figures, rounds = list[RoundFigures](), list[dict[str, Mapping[str, float]]]()
    for number in range(1, simulation.rounds + 1):
        played = run.play(strategy.cohort(sorted(clients), number, federation.state))
        bytes_down = federation.hand_out(played)
        results = federation.round(played)
        rounds.append({result.client: result.metrics for result in results})
        figures.append(_figures(played, results, bytes_down, federation.judged))
        progress("rounds", number, simulation.rounds)
    if all(round_.skipped for round_ in figures):
        raise AggregationError(f"every round was skipped; the first: {figures[0].skipped}")
    tensors, state, kept = federation.tensors, federation.state, federation.kept
    last = simulation.rounds + 1
    received = [strategy.received(client.name, tensors, state) for client in population.clients]
    ended = runner.run(last, population.clients, received, kept)
    if simulation.protocol != "last":
        counts = selected(simulation.protocol, [*rounds, {r.client: r.metrics for r in ended}])
        return Outcome(tuple(figures), {"personal@clients": _mode(counts)}, tensors, state)
    modes = {"personal@clients": _mode([_counts(r) for r in ended])}
    modes |= _common_modes(model, tensors, population)
    if simulation.finetune_epochs:
        tuned = FedAvg(replace(strategy.local, epochs=simulation.finetune_epochs, max_steps=0, record=None))
        everyone = population.clients
        results = runner_of(tuned).run(last, everyone, [tensors] * len(everyone), {})
        modes[f"finetuned({simulation.finetune_epochs})"] = _mode([_counts(r) for r in results])
    return Outcome(tuple(figures), modes, tensors, state)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What a fold said of clients; the fields of ``RoundFigures``."""

    refused: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(slots=True)
class _Federation:
    """The server's tensors and state, those of the versions before that still count, and what the clients kept."""

    strategy: Strategy
    runner: Runner
    clients: Mapping[str, SimulatedClient]
    simulation: Simulation
    sums: SimulatedSums | None
    downloads: SimulatedDownloads
    tensors: Arrays
    state: Arrays = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    judged: _Judged = field(default_factory=_Judged)
    _version: int = 0
    _bases: dict[int, tuple[int, Arrays, Arrays]] = field(default_factory=dict)

    def hand_out(self, played: VirtualRound) -> int:
        """Bytes of the tasks of a round."""
        return self.downloads.given(
            played.fetched, lambda client: self.strategy.received(client, self.tensors, self.state)
        )

    def round(self, played: VirtualRound) -> list[ClientRound]:
        """Train what counts in a round, each update from the tensors of its task, and fold it."""
        self.judged = _Judged()
        buffering = self.strategy.buffering
        oldest = self._version - (buffering.max_staleness if buffering else 0)
        self._bases = {task: base for task, base in self._bases.items() if base[0] >= oldest}
        self._bases[played.number] = self._version, self.tensors, self.state
        if not played.published:
            return []
        made = {
            r.client: r
            for task in sorted({c.task for c in played.counted})
            for r in self._train(task, played)
        }
        results = [made[counted.client] for counted in sorted(played.counted, key=lambda c: c.client)]
        self._fold(played, made)
        if self.judged.skipped:
            return []
        self._version += 1
        self.kept |= {r.client: r.kept for r in results}
        return results

    def _train(self, task: int, played: VirtualRound) -> list[ClientRound]:
        _, tensors, state = self._bases[task]
        names = sorted(counted.client for counted in played.counted if counted.task == task)
        received = [self.strategy.received(name, tensors, state) for name in names]
        return self.runner.run(task, [self.clients[name] for name in names], received, self.kept)

    def _fold(self, played: VirtualRound, made: Mapping[str, ClientRound]) -> None:
        number, specs = played.number, self.runner.specs
        noise = np.random.Generator(np.random.PCG64(rng_key(self.simulation.seed, number, _NOISE, 0)))
        sent = uploaded(specs, self.strategy.info.upload())
        faults = {c.client: _fault(made[c.client], sent) for c in played.counted}
        if all(faults.values()):
            first = next(iter(faults.values()))
            raise AggregationError(
                f"round {number}: no update can be used; {first}; use a smaller learning rate"
            )
        usable = [counted for counted in played.counted if not faults[counted.client]]
        unusable = tuple(sorted(client for client, fault in faults.items() if fault))
        updates = [self._contribution(counted, made[counted.client]) for counted in usable]
        try:
            if self.sums is not None:
                updates = [self.sums.of(number, specs, self.strategy.info.upload(), self.tensors, updates)]
            turn = Turn(self.simulation.seed, number)
            folded = fold_broadcast(
                self.strategy, specs, self.tensors, self.state, updates, turn, generator=noise
            )
        except TooFewUpdatesError as error:
            refused = tuple(sorted((*unusable, *(j.client for j in error.refused))))
            self.judged = _Judged(refused, refused, str(error))
            return
        evidence = folded.mean.evidence
        self.judged = _Judged(
            tuple(sorted((*unusable, *(j.client for j in evidence if j.verdict == "refused")))),
            tuple(sorted((*unusable, *(j.client for j in evidence if j.suspect)))),
        )
        try:
            check_finite(folded.tensors)
        except ShapeError as error:
            raise AggregationError(f"round {number}: {error}; use a smaller learning rate") from error
        self.tensors, self.state = dict(folded.tensors), dict(folded.state)
        self.downloads.publish(self.tensors, self.state)

    def _contribution(self, counted: Counted, result: ClientRound) -> Contribution:
        update, current, base = result.update, self.tensors, self._bases[counted.task][1]
        if counted.staleness:
            update = rebased(update, self.runner.specs, base, current)
        return Contribution(
            result.client, result.num_examples, lambda: update, result.num_steps, staleness=counted.staleness
        )


def _sums(strategy: Strategy, machine_of: MachineOf | None, seed: int) -> SimulatedSums | None:
    """How updates are summed under masks; None when they are not."""
    if not strategy.secure.addition:
        return None
    if machine_of is None:
        raise ConfigError("secagg=on needs the members' machines: give machine_of")
    return SimulatedSums(strategy.secure, strategy.averaging.weighting == "uniform", machine_of, seed)


def _check_ranks(strategy: Strategy, specs: Sequence[TensorSpec], clients: Sequence[SimulatedClient]) -> None:
    limited = any(client.max_lora_rank != NO_RANK_LIMIT for client in clients)
    if limited and all(spec.role != TensorRole.LORA_RANK for spec in specs):
        raise ConfigError(
            f"clients limit a rank, and {strategy.info.name} has no low-rank factors; use epfl, or leave ranks out"
        )


def _fault(result: ClientRound, sent: Sequence[TensorSpec]) -> str:
    """Why the service would not accept the update; empty when it would."""
    try:
        check_update(result.update, sent, client=result.client)
    except AggregationError as error:
        return str(error)
    return ""


def _virtual_run(strategy: Strategy, population: Population, simulation: Simulation) -> VirtualRun:
    cohort, policy = policies_of(strategy.buffering, simulation.cohort, simulation.policy)
    examples = {client.name: len(client.train) for client in population.clients}
    lease_s = _LEASE_MEDIANS * simulation.latency.median_s
    return VirtualRun(examples, cohort, policy, simulation.latency, simulation.seed, lease_s)


def _common_modes(model: Classifier, tensors: Arrays, population: Population) -> dict[str, Mode]:
    """The global model on those who took part and on the others."""
    groups = {"global@clients": population.clients, "unseen": population.unseen}
    return {
        name: _mode([_accuracy(model, tensors, client) for client in clients])
        for name, clients in groups.items()
        if clients
    }


def _first_tensors(model: Classifier, specs: Sequence[TensorSpec]) -> dict[str, NDArray[np.generic]]:
    """The model's values, and zeros for what the strategy adds."""
    known = {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}
    return {s.name: known.get(s.name, np.zeros(s.shape, s.dtype)) for s in downloaded_specs(specs)}


def _figures(
    played: VirtualRound, results: Sequence[ClientRound], bytes_down: int, judged: _Judged
) -> RoundFigures:
    shares = [hits / count for hits, count in (_counts(r, "evaluate_before") for r in results)]
    return RoundFigures(
        number=played.number,
        clients=len(results),
        received=float(np.mean(shares)) if shares else None,
        bytes_down=bytes_down,
        bytes_up=sum(result.sent_bytes for result in results),
        lost=played.lost,
        staleness=sum(c.staleness for c in played.counted) / max(1, len(played.counted)),
        virtual_s=played.ended_s,
        refused=judged.refused,
        suspects=judged.suspects,
        skipped=judged.skipped,
    )


def _measured(population: Population, simulation: Simulation) -> Population:
    """The population with validation parts where the protocol chooses by them, and without where nothing does."""
    if simulation.protocol == "last":
        parts = [
            [replace(client, validation=None) for client in clients]
            for clients in (population.clients, population.unseen)
        ]
        return Population(*parts)
    without = [c.name for c in population.clients if c.validation is None or not len(c.validation)]
    if without:
        raise ConfigError(
            f"protocol {simulation.protocol} chooses by validation windows, {', '.join(without)} have none"
        )
    return population


def _counts(result: ClientRound, phase: str = "evaluate_after") -> tuple[float, float]:
    """Hits and windows of a phase."""
    return accuracy_counts(result.metrics, phase)


def _accuracy(model: Classifier, tensors: Arrays, client: SimulatedClient) -> tuple[float, float]:
    """Hits and windows of the global tensors alone on a client's held-out part."""
    names = model.state_dict().keys()
    values = {name: torch.from_numpy(np.array(tensors[name])) for name in names}
    network = model.eval()
    hits = 0
    with torch.no_grad():
        for begin in range(0, len(client.holdout), _EVALUATED_AT_ONCE):
            x = torch.from_numpy(np.array(client.holdout.x[begin : begin + _EVALUATED_AT_ONCE]))
            logits = torch.func.functional_call(network, values, (x,))
            said = logits.argmax(dim=1).numpy()
            hits += int((said == client.holdout.y[begin : begin + _EVALUATED_AT_ONCE]).sum())
    return float(hits), float(len(client.holdout))


def _mode(counts: Sequence[tuple[float, float]]) -> Mode:
    hits, windows = np.array(counts, np.float64).T
    shares = np.sort(hits / windows)
    worst = shares[: max(1, len(shares) // 10)]
    return Mode(
        float(shares.mean()),
        float(hits.sum() / windows.sum()),
        float(worst.mean()),
        float(shares.std()),
        len(shares),
    )
