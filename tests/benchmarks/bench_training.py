"""Training throughput in HAROOD's configuration: 4 domains x 32 windows of 6 x 128, CNN, Adam.

    git clone https://github.com/AIFrontierLab/HAROOD /tmp/harood      # optional, measured at 3c2ce00e
    python tests/benchmarks/bench_training.py [--harood /tmp/harood] [--threads 1 2] [--algorithms erm coral mmd]
        [--stack 1 4 16 64] [--device cuda] [--csv FILE] [--plot FILE]

Compares, in one run and taking turns, for every algorithm: HAROOD's own step with its data loaders (one process a
domain) and on batches that are there already; a plain loop in torch (its module, its optimiser, resident data); ours
through ``training.loop``, as ``train`` runs it. Then aggregate steps a second of runs that advance together.

Correctness first: before anything is timed, loss and all gradients of ours must equal those of the plain loop.
CPU time is that of all processes that take part; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import bench_report as report
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from harood_peer import ALGORITHMS as PEERS
from harood_peer import harood_loop
from stacked_training import stacked_loop
from torch import nn
from training_plot import draw
from wearfleet_cloud.algorithms import build_algorithm
from wearfleet_cloud.training.loop import Resident, advance, resident
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import ModelSpec, build_classifier

Loop = Callable[[int], None]
"""Makes so many steps and waits for their end."""

_DECAY = 5e-4  # of the reference


def data() -> Resident:
    """Four domains of 1 500 random windows, the size of a person group of HAPT."""
    generator = np.random.default_rng(0)
    domains = [
        (generator.standard_normal((1500, 6, 128), dtype=np.float32), generator.integers(0, 6, 1500))
        for _ in range(4)
    ]
    return resident(domains, torch.get_default_device())


def stock_network() -> nn.Sequential:
    """The network of torch's own layers."""
    layers: list[nn.Module] = []
    for channels, filters in ((6, 16), (16, 32)):
        layers += [nn.Conv1d(channels, filters, 9), nn.BatchNorm1d(filters), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(832, 6))


def stock_loop(windows: Resident) -> Loop:
    """A plain loop of ERM: resident data, torch's layers, torch's Adam, loss kept on the device."""
    network = stock_network()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=_DECAY)
    x = windows.x.transpose(1, 2).contiguous()
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def run(steps: int) -> None:
        total = torch.zeros(())
        for _ in range(steps):
            index = torch.randint(0, 1500, (4, 32), generator=generator) + windows.first[:, None]
            loss = F.cross_entropy(network(x[index.flatten()]), windows.y[index.flatten()])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.detach()
        total.item()

    return run


def our_loop(name: str, backbone: str, windows: Resident) -> Loop:
    """One of our algorithms as ``train`` runs it, without evaluations."""
    model = build_classifier(ModelSpec(backbone, 6, 128, 6))
    algorithm = build_algorithm(name, model, Adam(weight_decay=_DECAY), domains=4)
    hyper = {n: torch.tensor(float(v)) for n, v in {"lr": 1e-3, **algorithm.info.hyper}.items()}
    state, made = algorithm.init(), 0

    def run(steps: int) -> None:
        nonlocal state, made
        state, metrics = advance(
            algorithm,
            state,
            windows,
            hyper,
            key=torch.tensor(0),
            steps=range(made, made + steps),
            batch=32,
            on_step=lambda _: None,
        )
        made += steps
        metrics["loss"].item()

    return run


def check(windows: Resident) -> None:
    """Loss and gradients of ours equal those of torch's own layers, or nothing is timed."""
    model = build_classifier(ModelSpec("cnn", 6, 128, 6))
    algorithm = build_algorithm("erm", model, Sgd(), domains=4)  # a step of size 1 is the gradient
    network = stock_network()
    tensors = [t for n, t in model.state_dict().items() if not n.startswith("standardise.")]
    network.load_state_dict(dict(zip(network.state_dict(), tensors, strict=True)))
    batch = windows.batch(torch.arange(32).repeat(4, 1) + windows.first[:, None])
    before = algorithm.init()
    after, metrics = algorithm.step(before, batch, {"lr": torch.tensor(1.0)}, torch.tensor(0))
    loss = F.cross_entropy(network(batch.x.flatten(0, 1)), batch.y.flatten())
    grads = torch.autograd.grad(loss, list(network.parameters()))
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    ours = [before.params[name] - after.params[name] for name in before.params]
    torch.testing.assert_close(ours, list(grads), rtol=1e-3, atol=1e-5)


def providers(name: str, backbone: str, windows: Resident, harood: Path | None) -> dict[str, Loop]:
    """Everything that makes steps of one algorithm."""
    loops: dict[str, Loop] = {}
    if harood is not None and name in PEERS and backbone == "cnn":
        loops["HAROOD, its loaders"] = harood_loop(harood, name, windows, loader=True)
        loops["HAROOD, batches there"] = harood_loop(harood, name, windows, loader=False)
    if name == "erm" and backbone == "cnn":
        loops["torch, plain loop"] = stock_loop(windows)
    loops["ours"] = our_loop(name, backbone, windows)
    return loops


def measure(
    case: str, loops: dict[str, Loop], block: int, turns: int, each: dict[str, int]
) -> list[report.Row]:
    """Time some loops that take turns.

    Args:
        case: of the rows.
        loops: by provider.
        block: calls between two looks at the clock.
        turns: of every provider.
        each: steps of one call, by provider, where that is not 1.
    """
    walls: dict[str, list[float]] = {name: [] for name in loops}
    cpus: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(block)
    for _ in range(turns):
        for name, loop in loops.items():
            wall, cpu, steps = (
                time.perf_counter(),
                report.family_cpu_seconds(os.getpid()),
                block * each.get(name, 1),
            )
            loop(block)
            walls[name].append(steps / (time.perf_counter() - wall))
            cpus[name].append(1e3 * (report.family_cpu_seconds(os.getpid()) - cpu) / steps)
    rows = []
    for name in loops:
        about = {"benchmark": "training", "case": case, "provider": name}
        rows.append(report.row(walls[name], **about, metric="throughput", unit="steps/s"))
        rows.append(report.row(cpus[name], **about, metric="CPU time", unit="ms/step"))
    return rows


def stacked(counts: list[int], threads: int) -> list[report.Row]:
    """Aggregate steps a second of ERM runs that advance together; the single run is the plain loop of ``train``."""
    torch.set_num_threads(threads)
    rows = []
    for runs in counts:
        loops = {"one by one": our_loop("erm", "cnn", data()), f"stack of {runs}": stacked_loop("erm", runs)}
        block = max(64 // runs, 2)
        each = {f"stack of {runs}": runs}
        rows += measure(f"stack, {threads} threads", loops, block, 5, each)
    return rows


def main() -> None:
    """Parse, check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--harood", type=Path, help="checkout of the reference; CPU only")
    parser.add_argument("--algorithms", nargs="+", default=["erm", "coral", "mmd"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backbones", nargs="+", default=["cnn"])
    parser.add_argument("--turns", type=int, default=9, help="of every provider")
    parser.add_argument("--block", type=int, default=64, help="steps between two looks at the clock")
    parser.add_argument("--stack", type=int, nargs="*", help="runs together; none to leave it out")
    parser.add_argument("--device", default="cpu", help="of torch; it is awaited by reading the loss")
    parser.add_argument("--csv", type=Path, default=Path("runs/bench/training.csv"))
    parser.add_argument("--plot", type=Path, help="picture of the result")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    gpu = arguments.device != "cpu"
    check(data())
    rows = []
    for backbone in arguments.backbones:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for name in arguments.algorithms:
                loops = providers(name, backbone, data(), None if gpu else arguments.harood)
                rows += measure(f"{name} {backbone} {threads}t", loops, arguments.block, arguments.turns, {})
    counts = arguments.stack if arguments.stack is not None else [1, 4, 16, 64, *([256, 1024] if gpu else [])]
    rows += stacked(counts, arguments.threads[-1]) if counts else []
    report.print_table(rows)
    report.write_csv(arguments.csv, rows, ["torch"])
    if arguments.plot:
        draw(rows, torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores", arguments.plot)


if __name__ == "__main__":
    main()
