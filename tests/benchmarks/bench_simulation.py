"""A simulated round of federated averaging with many clients of the 99,466-parameter network: seconds and memory.

    python tests/benchmarks/bench_simulation.py [--clients 1000] [--stack 32] [--device cpu] [--csv FILE.csv]

Clients are stacked with ``vmap``; each has 32 random windows of 27 x 200 to learn from (one step of batch 32) and 8 to
be measured on, before and after. Beside it: the same clients one at a time, and a bare torch loop over them that only
trains. The network is that of PersonalizedFL's PAMAP2 runs (specs/federated.md section 0.6).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_report import Row, peak_mib, print_table, reset_peak, row, write_csv
from torch.func import functional_call, grad
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.windowing import LabelledWindows

SPEC = ModelSpec("cnn", 27, 200, 10, neck="dense", neck_width=64)
PARAMETERS = 99_466
TRAIN, HOLDOUT, BATCH = 32, 8, 32
LOCAL = {"epochs": 1, "batch_size": BATCH, "learning_rate": 0.01}


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    model = build_classifier(SPEC, 0)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size != PARAMETERS:
        sys.exit(f"the network should have {PARAMETERS} parameters, it has {size}")
    clients = [_client(number) for number in range(given.clients)]
    data_mib = sum(client.train.x.nbytes + client.holdout.x.nbytes for client in clients) / 2**20
    rows = [_row("clients' windows", "memory", "MiB", [data_mib], given)]
    for name, stack in (("stacked", given.stack), ("one by one", 1)):
        rows += _measured(name, lambda stack=stack: _rounds(model, clients, stack, given), given)
    rows += _measured("bare torch loop, training only", lambda: _bare(model, clients, given), given)
    print_table(rows)
    if given.csv:
        write_csv(given.csv, rows, ("torch", "numpy"))


def _rounds(
    model: Classifier, clients: list[SimulatedClient], stack: int, given: argparse.Namespace
) -> list[float]:
    """Seconds of each counted round: training, evaluation before and after, average."""
    times = [time.monotonic()]
    simulate(
        create_strategy("fedavg", LOCAL),
        model,
        Population(clients),
        Simulation(given.rounds + 1, CohortPolicy(0)),
        lambda strategy: StackedClients(strategy, model, 0, at_once=stack, device=given.device),
        progress=lambda *_: times.append(time.monotonic()),
    )
    return np.diff(times)[1:].tolist()


def _bare(model: Classifier, clients: list[SimulatedClient], given: argparse.Namespace) -> list[float]:
    """A step of each client with one copy of the weights after the other, differences summed: no evaluation."""
    model = model.to(given.device).eval()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(functional_call(model, weights, (x,)), y)

    seconds = []
    for _ in range(given.rounds):
        begin = time.monotonic()
        total = {name: torch.zeros_like(value) for name, value in values.items()}
        for client in clients:
            x, y = (torch.from_numpy(part).to(given.device) for part in (client.train.x, client.train.y))
            for name, slope in grad(loss)(values, x, y).items():
                total[name] -= LOCAL["learning_rate"] * slope
        values = {name: value + total[name] / len(clients) for name, value in values.items()}
        values["head.bias"].sum().item()
        seconds.append(time.monotonic() - begin)
    return seconds


def _measured(name: str, work: Callable[[], list[float]], given: argparse.Namespace) -> list[Row]:
    reset_peak(os.getpid())
    begin = resource.getrusage(resource.RUSAGE_SELF)
    seconds = work()
    end = resource.getrusage(resource.RUSAGE_SELF)
    used = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    return [
        _row(name, "round", "s", seconds, given),
        _row(name, "processor time, whole run", "s", [used], given),
        _row(name, "peak memory", "MiB", [peak_mib(os.getpid())], given),
    ]


def _row(provider: str, metric: str, unit: str, values: list[float], given: argparse.Namespace) -> Row:
    case = f"{given.clients} clients, {given.device}"
    return row(values, benchmark="simulation", case=case, provider=provider, metric=metric, unit=unit)


def _client(number: int) -> SimulatedClient:
    generator = np.random.default_rng(number)

    def windows(count: int) -> LabelledWindows:
        x = generator.standard_normal((count, SPEC.channels, SPEC.window), dtype=np.float32)
        order = np.arange(count)
        return LabelledWindows(x, generator.integers(0, SPEC.classes, count), order, order)

    return SimulatedClient(f"client-{number:05d}", windows(TRAIN), windows(HOLDOUT))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--stack", type=int, default=32, help="clients that advance together")
    parser.add_argument("--rounds", type=int, default=3, help="counted ones; one more comes before them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
