"""Training throughput in HAROOD's configuration: 4 domains x 32 windows of 6 x 128, CNN, Adam.

    python tests/benchmarks/bench_training.py [--threads 1 2] [--steps 200] [--device cuda] [--csv FILE]

Compares, in one run and interleaved, a plain training loop in torch (its module, its optimiser, resident data) with
every algorithm of ours through ``training.loop``. Correctness first: before anything is timed, the loss and all
gradients of ours must equal those of the plain loop. HAROOD's own code
made 40 (ERM) and 20 (CORAL) steps a second on two quiet cores.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import nn
from wearfleet_cloud.algorithms import ALGORITHMS, build_algorithm, network_of
from wearfleet_cloud.training.loop import Resident, advance, resident
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import ModelSpec, build_classifier

_BLOCK = 20  # steps between two looks at the clock


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: steps a second, median and 20th and 80th percentile of the blocks."""

    provider: str
    backbone: str
    threads: int
    steps_per_second: float
    slow_fifth: float
    fast_fifth: float
    cpu_ms_per_step: float
    device: str
    torch: str


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


def stock_loop(windows: Resident) -> Callable[[int], None]:
    """A plain loop: resident data, torch's layers, torch's Adam, loss kept on the device."""
    network = stock_network()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    x, generator = (
        windows.x.transpose(1, 2).contiguous(),
        torch.Generator(torch.get_default_device()).manual_seed(0),
    )

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


def our_loop(name: str, backbone: str, windows: Resident) -> Callable[[int], None]:
    """One of our algorithms as ``train`` runs it, without evaluations."""
    domains = len(windows.sizes)
    network = network_of(name, ModelSpec(backbone, 6, 128, 6), domains)
    algorithm = build_algorithm(name, build_classifier(network), Adam(), domains=domains)
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
    algorithm = build_algorithm("erm", model, Sgd())  # a step of size 1 is the gradient
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


def measure(threads: int, steps: int, backbone: str) -> list[Row]:
    """Time all providers, one block of each in turn."""
    torch.set_num_threads(threads)
    windows = data()
    loops = {name: our_loop(name, backbone, windows) for name in ALGORITHMS}
    if backbone == "cnn":
        loops = {"torch (plain loop)": stock_loop(windows), **loops}
    walls: dict[str, list[float]] = {name: [] for name in loops}
    cpus: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(_BLOCK)
    for _ in range(max(steps // _BLOCK, 5)):
        for name, loop in loops.items():
            wall, cpu = time.perf_counter(), time.process_time()
            loop(_BLOCK)
            walls[name].append((time.perf_counter() - wall) / _BLOCK)
            cpus[name].append((time.process_time() - cpu) / _BLOCK)
    return [row(name, backbone, threads, walls[name], cpus[name]) for name in loops]


def row(name: str, backbone: str, threads: int, wall: list[float], cpu: list[float]) -> Row:
    """Summary of the blocks of one provider."""
    quintiles = statistics.quantiles(wall, n=5)
    rates = [round(1 / seconds, 1) for seconds in (statistics.median(wall), quintiles[3], quintiles[0])]
    return Row(
        name,
        backbone,
        threads,
        *rates,
        round(1e3 * statistics.median(cpu), 2),
        device_name(),
        torch.__version__,
    )


def device_name() -> str:
    """What runs the arithmetic."""
    device = torch.get_default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    """Parse, check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backbones", nargs="+", default=["cnn"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--device", default="cpu", help="of torch; CUDA events are awaited by reading the loss"
    )
    parser.add_argument("--csv", type=Path, default=Path("runs/bench/training.csv"))
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    check(data())
    rows = [
        one
        for backbone in arguments.backbones
        for threads in arguments.threads
        for one in measure(threads, arguments.steps, backbone)
    ]
    print(
        f"{'provider':20} {'backbone':12} {'threads':>7} {'steps/s':>8} {'20 %':>7} {'80 %':>7} {'CPU ms':>7}"
    )
    for one in rows:
        print(
            f"{one.provider:20} {one.backbone:12} {one.threads:7} {one.steps_per_second:8.1f} "
            f"{one.slow_fifth:7.1f} {one.fast_fifth:7.1f} {one.cpu_ms_per_step:7.2f}"
        )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(one) for one in rows)


if __name__ == "__main__":
    main()
