"""Command ``simulate``: a federation in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from wearfleet_models.classifier import Classifier
    from wearfleet_protos.plan import Plan
    from wearfleet_protos.records import Source
    from wearfleet_protos.secagg.identity import Signer, Verifier
    from wearfleet_protos.secagg.parameters import SecureParameters
    from wearfleet_protos.tensors import Digest

    from wearfleet_cloud.data.dataset import Progress
    from wearfleet_cloud.data.prepared import Prepared
    from wearfleet_cloud.export.run_folder import Run
    from wearfleet_cloud.federated.attacks import Attack
    from wearfleet_cloud.federated.base import Strategy
    from wearfleet_cloud.federated.latency import Latency
    from wearfleet_cloud.federated.privacy.secagg_local import MemberMachine
    from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation
    from wearfleet_cloud.federated.simulated_clients import SimulatedClient
    from wearfleet_cloud.federated.stacked_clients import Runner
    from wearfleet_cloud.federated.wire_clients import DeviceRound, Stored

__all__ = ["device_engine", "device_member", "register"]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("simulate")(_simulate)


def _simulate(
    *,
    strategy: Annotated[str, typer.Option("--strategy", help="A name of `strategies`.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Name of the data set, or a .py file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results; further runs are added to it.")],
    clients: Annotated[
        int, typer.Option("--clients", min=0, help="Clients with the unseen ones; 0: every person.")
    ] = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Training rounds.")] = 20,
    split: Annotated[str, typer.Option("--split", help="people, or label-skew.")] = "people",
    alpha: Annotated[
        float, typer.Option("--alpha", help="Of label-skew: the smaller, the more skewed.")
    ] = 0.1,
    protocol: Annotated[
        str, typer.Option("--protocol", help="Which round counts: last, personalizedfl or fhbench.")
    ] = "last",
    unseen: Annotated[int, typer.Option("--unseen", min=0, help="Clients that never take part.")] = 0,
    cohort: Annotated[int, typer.Option("--cohort", min=0, help="Clients a round; 0 for all.")] = 0,
    over_selection: Annotated[float, typer.Option(help="Ask so many times the cohort.")] = 1.0,
    quorum: Annotated[int, typer.Option(min=1, help="Fewest updates worth averaging.")] = 1,
    deadline: Annotated[float, typer.Option(help="Virtual seconds that a round waits for clients.")] = 300.0,
    latency: Annotated[
        str, typer.Option(help="Virtual seconds a task: MEDIAN, MEDIAN,BETWEEN,WITHIN or a CSV file.")
    ] = "1",
    dropout: Annotated[float, typer.Option(help="Share of tasks after which a client is lost.")] = 0.0,
    finetune: Annotated[
        int, typer.Option("--finetune", min=0, help="k of finetuned(k); 0 leaves it out.")
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="name=value: hyper-parameter, attack and attacker_share, ranks of clients in turn."
        ),
    ] = None,
    backbone: Annotated[
        str, typer.Option("--backbone", help="Of a network with random first weights.")
    ] = "cnn",
    run: Annotated[
        Path | None, typer.Option("--run", help="Begin with the model of a training run instead.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, splits, cohorts and shuffling.")] = 0,
    wire: Annotated[
        bool, typer.Option("--wire", help="Through real plans and bytes, on the agent's own engine.")
    ] = False,
    stack: Annotated[int, typer.Option("--stack", min=1, help="Clients that advance together.")] = 32,
    device: Annotated[str, typer.Option("--device", help="Of torch: cpu, cuda; not with --wire.")] = "cpu",
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Address of a Ray cluster that runs the clients; not with --wire."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", envvar="WEARFLEET_DATA_ROOT", help="Folder with the distributions."),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", help="Folder of prepared data.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and no progress.")] = False,
) -> None:
    """Simulate a federation on the people of a data set, or on clients with skewed labels."""
    from dataclasses import replace

    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.cli.plan import parse_settings
    from wearfleet_cloud.data import dataset_named
    from wearfleet_cloud.data.prepared import default_cache_dir, prepare
    from wearfleet_cloud.federated import create_strategy
    from wearfleet_cloud.federated.cohort import CohortPolicy
    from wearfleet_cloud.federated.round_record import RoundPolicy
    from wearfleet_cloud.federated.simulate import Simulation
    from wearfleet_cloud.federated.simulated_clients import split_hash, with_ranks

    if wire and ray is not None:
        raise ConfigError("--wire runs on this machine alone; leave --ray or --wire out")
    options = parse_settings(settings or [])
    attack, others = _attack(options)
    ranks, of_strategy = _ranks(others)
    chosen = create_strategy(strategy, of_strategy)
    simulation = Simulation(
        rounds,
        CohortPolicy(cohort, 1, over_selection),
        seed,
        finetune,
        RoundPolicy(quorum=quorum, deadline_s=deadline),
        _latency(latency, dropout, seed),
        protocol,
    )
    prepared = prepare(dataset_named(dataset), data_root, cache_dir or default_cache_dir())
    validated = protocol != "last"
    population = _population(
        prepared, clients, unseen, split=split, alpha=alpha, seed=seed, validated=validated
    )
    if ranks:
        population = replace(population, clients=with_ranks(population.clients, ranks))
    trained = None if run is None else _trained(run, prepared)
    begin = _model(prepared, population, backbone, seed) if trained is None else trained.model
    model = chosen.network(begin, seed)
    about: dict[str, object] = {
        "strategy": strategy,
        "options": " ".join(f"{name}={value}" for name, value in sorted(options.items())),
        "dataset": prepared.dataset.name,
        "split": split if split == "people" else f"{split}({alpha:g})",
        "split_hash": split_hash([*population.clients, *population.unseen]),
        "protocol": protocol,
        "clients": len(population.clients),
        "unseen": len(population.unseen),
        "rounds": rounds,
        "cohort": cohort,
        "latency": latency if dropout == 0.0 else f"{latency} dropout {dropout:g}",
        "seed": seed,
        "begins_with": backbone if trained is None else trained.identity,
        "wire": wire,
        "simulated": prepared.dataset.simulated,
        **_cost(chosen, rounds),
    }
    with ExitStack() as open_things:
        if wire:
            honest = _wire(prepared, model, seed)
        elif ray is not None:
            honest = _on_ray(ray, model, seed, stack, device=device, open_things=open_things)
        else:
            honest = _stacked(model, seed, stack, device)
        runner = _attacked(honest, attack, population, model, seed)
        _run(chosen, model, population, simulation, runner, about=about, out=out, as_json=as_json)


def _cost(strategy: Strategy, rounds: int) -> dict[str, object]:
    """What the strategy's privacy would cost a client in every round, or its windows; empty without privacy."""
    from dataclasses import replace

    from wearfleet_cloud.federated.privacy.accounting import epsilon_of
    from wearfleet_cloud.federated.privacy.ledger import cost_of_round

    cost = cost_of_round(strategy.privacy)
    if cost is None:
        return {}
    delta = strategy.privacy.dp_delta
    epsilon = epsilon_of([replace(cost, count=cost.count * rounds)], delta)
    return {"epsilon": float(f"{epsilon:.4g}"), "delta": delta, "epsilon_of": cost.unit}


def _run(
    strategy: Strategy,
    model: Classifier,
    population: Population,
    simulation: Simulation,
    runner: Callable[[Strategy], Runner],
    *,
    about: Mapping[str, object],
    out: Path,
    as_json: bool,
) -> None:
    from wearfleet_cloud.cli.data import progress_bars
    from wearfleet_cloud.data.dataset import silent
    from wearfleet_cloud.federated.simulate import simulate
    from wearfleet_cloud.federated.simulation_report import row_of, write_report

    def run(progress: Progress) -> Outcome:
        return simulate(
            strategy, model, population, simulation, runner, machine_of=device_member, progress=progress
        )

    begin = time.monotonic()
    if as_json:
        outcome = run(silent)
    else:
        with progress_bars() as bars:
            outcome = run(bars)
    row = row_of(about, outcome, time.monotonic() - begin)
    write_report(out, row, outcome)
    print(json.dumps({**row, "out": str(out)}) if as_json else (out / "table.md").read_text(encoding="utf-8"))


def _attack(options: Mapping[str, object]) -> tuple[Attack, dict[str, object]]:
    """The simulated attack, and the other options."""
    from wearfleet_cloud.federated.attacks import Attack
    from wearfleet_cloud.federated.training_options import option_names, parse_options

    own = option_names(Attack)
    attack = Attack(**parse_options(Attack, {name: v for name, v in options.items() if name in own}))
    return attack, {name: value for name, value in options.items() if name not in own}


def _ranks(options: Mapping[str, object]) -> tuple[tuple[int, ...], dict[str, object]]:
    """Highest ranks that clients allow, in turn (none: no limits), and the other options."""
    from wearfleet_protos.errors import ConfigError

    others = {name: value for name, value in options.items() if name != "ranks"}
    if len(others) == len(options):
        return (), others
    try:
        return tuple(int(number) for number in str(options["ranks"]).split(",")), others
    except ValueError as error:
        raise ConfigError(
            f"ranks must be whole numbers with commas between, as in 2,4,8, got {options['ranks']!r}"
        ) from error


def _attacked(
    honest: Callable[[Strategy], Runner], attack: Attack, population: Population, model: Classifier, seed: int
) -> Callable[[Strategy], Runner]:
    from wearfleet_cloud.federated.attacks import Attackers, chosen_attackers

    if attack.attack == "none":
        return honest
    names = chosen_attackers([client.name for client in population.clients], attack.attacker_share, seed)
    return lambda strategy: Attackers(honest(strategy), attack.attack, names, model.spec.classes)


def _latency(text: str, dropout: float, seed: int) -> Latency:
    """Drawn times as MEDIAN or MEDIAN,BETWEEN,WITHIN, or a file of recorded ones.

    BETWEEN and WITHIN are standard deviations of the logarithm, between clients and between a client's tasks.
    """
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.federated.latency import Latency, read_recorded

    if text.endswith(".csv"):
        return Latency(dropout=dropout, seed=seed, recorded=read_recorded(Path(text)))
    numbers = text.split(",")
    if len(numbers) not in (1, 3):
        raise ConfigError(f"latency is MEDIAN, MEDIAN,BETWEEN,WITHIN or a .csv file, got {text!r}")
    try:
        median, between, within = (float(number) for number in (*numbers, "0", "0")[:3])
    except ValueError as error:
        raise ConfigError(f"latency must be numbers or a .csv file, got {text!r}") from error
    return Latency(median, between, within, dropout, seed)


def _population(
    prepared: Prepared, clients: int, unseen: int, *, split: str, alpha: float, seed: int, validated: bool
) -> Population:
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.federated.simulate import Population
    from wearfleet_cloud.federated.simulated_clients import label_skew, people

    if split == "people":
        everyone = people(prepared, clients, validated=validated)
    elif split == "label-skew":
        everyone = label_skew(prepared.windows.x, prepared.windows.activity, clients or 20, alpha, seed)
    else:
        raise ConfigError(f"split must be people or label-skew, got {split!r}")
    if unseen >= len(everyone):
        raise ConfigError(f"of {len(everyone)} clients {unseen} cannot be unseen; nobody would take part")
    seen = len(everyone) - unseen
    return Population(everyone[:seen], everyone[seen:])


def _model(prepared: Prepared, population: Population, backbone: str, seed: int) -> Classifier:
    """A network with first weights from the seed, standardised by the training windows of those who take part."""
    import torch
    from wearfleet_models.classifier import build_classifier

    from wearfleet_cloud.data.standardisation import standardisation_of
    from wearfleet_cloud.training.trainer import model_spec_for

    model = build_classifier(model_spec_for(prepared.dataset, backbone), seed)
    mean, std = standardisation_of([client.train.x for client in population.clients])
    model.standardise.mean.copy_(torch.from_numpy(mean))
    model.standardise.std.copy_(torch.from_numpy(std))
    return model


def _trained(run: Path, prepared: Prepared) -> Run:
    """A training run, for the windows of its own data set."""
    from wearfleet_protos.errors import ConfigError

    from wearfleet_cloud.export.run_folder import read_run

    trained = read_run(run)
    if (trained.dataset, trained.labels) != (prepared.dataset.name, prepared.dataset.label_names):
        raise ConfigError(
            f"the run was trained on {trained.dataset} with {len(trained.labels)} classes, the clients have "
            f"{prepared.dataset.name} with {len(prepared.dataset.label_names)}; give both the same data"
        )
    return trained


def _stacked(model: Classifier, seed: int, stack: int, device: str) -> Callable[[Strategy], Runner]:
    from wearfleet_cloud.federated.stacked_clients import StackedClients

    return lambda strategy: StackedClients(strategy, model, seed, at_once=stack, device=device)


def _on_ray(
    address: str, model: Classifier, seed: int, stack: int, *, device: str, open_things: ExitStack
) -> Callable[[Strategy], Runner]:
    from wearfleet_cloud.federated.ray_clients import RayClients
    from wearfleet_cloud.ray_cluster import ray_cluster

    cluster = open_things.enter_context(ray_cluster(address, "no --ray"))
    return lambda strategy: RayClients(cluster, strategy, model, seed, at_once=stack, device=device)


def _wire(prepared: Prepared, model: Classifier, seed: int) -> Callable[[Strategy], Runner]:
    from wearfleet_cloud.export.run_folder import contract_of
    from wearfleet_cloud.federated.plan_builder import build_plan
    from wearfleet_cloud.federated.wire_clients import WireClients

    contract = contract_of(prepared.dataset)

    def runner(strategy: Strategy) -> Runner:
        return WireClients(
            *build_plan(strategy, model, contract, plan_id="simulation", seed=seed), device_engine
        )

    return runner


def device_engine(
    plan: Plan,
    graphs: Mapping[Digest, bytes],
    tensors: bytes,
    stored: Stored,
    client: SimulatedClient,
    *,
    round_number: int,
    source: Source | None = None,
) -> DeviceRound:
    """The agent's own engine: implements ``wire_clients.Engine``; ``source`` is as in ``run_plan``."""
    from wearfleet_edge.trainer import Limits, TrainingData, run_plan, start_state, upload_tensors
    from wearfleet_protos.codecs import Residual
    from wearfleet_protos.tensors import decode_tensors, encode_tensors

    from wearfleet_cloud.federated.wire_clients import DeviceRound, Stored

    kept = stored.tensors
    local: dict[str, Any] = decode_tensors(kept, plan.local_specs()) if kept else {}
    downloaded = decode_tensors(tensors, plan.download_specs())
    before = start_state(plan, downloaded, local, max_lora_rank=client.max_lora_rank)
    limits = Limits(plan.budget.seconds, float("inf"), lambda: 0, time.monotonic, lambda: False)
    data = TrainingData(client.train, client.holdout)
    result = run_plan(plan, graphs, before, data, round_number=round_number, limits=limits, source=source)
    stays = {spec.name: result.state[spec.name] for spec in plan.local_specs()}
    update = upload_tensors(plan, before, result.state)
    encoded = plan.update_format().encode(
        update, Residual.from_bytes(stored.residual), round_number=round_number, client=client.name
    )
    return DeviceRound(
        encoded.data,
        Stored(encode_tensors(stays) if stays else b"", encoded.residual.to_bytes()),
        result.metrics,
        result.num_examples,
        result.num_steps,
    )


def device_member(
    name: str, signer: Signer, verifier: Verifier, parameters: SecureParameters, seed: int
) -> MemberMachine:
    """The agent's own side of secure aggregation: implements ``secagg_simulated.MachineOf``."""
    import numpy as np
    from wearfleet_edge.secagg_client import Member, SecureClient

    member = Member(name, signer, verifier, 2, np.random.Generator(np.random.PCG64(seed)).bytes)
    return SecureClient(member, parameters, parameters.run_id, parameters.round)
