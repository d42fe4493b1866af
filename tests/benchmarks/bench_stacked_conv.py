"""The convolutions of stacked runs: as ``vmap`` lowers them, against patches and a batched matrix product.

    python tests/benchmarks/bench_stacked_conv.py [--device cuda] [--runs 1 16 64] [--seconds 1]

Both convolutions of the CNN (4 x 32 windows of 6 x 128, kernel 9), forward and backward, for S runs with weights and
windows of their own, in both memory orders (windows lie channels innermost in a training run):

* grouped: ``layers.Conv`` under ``torch.func.vmap``, which makes it one convolution of S groups;
* unfold: the k shifted copies of every window, side by side, times the weights in one batched matrix product;
* one by one: ``layers.Conv`` for one run after the other, what stacking has to beat.

The first convolution has no gradient for its input. Correctness first: all gradients of the three must agree. They
take turns, so that a busy moment hits all. Printed: milliseconds of one pass of all S runs, median and 20th and 80th
percentile; on a CPU those of one thread on the processor, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from wearfleet_models.layers import Conv

WINDOWS = 128

Gradients = tuple[Tensor, ...]
Provider = Callable[[Tensor, Tensor, Tensor], Gradients]


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution: channels, filters, samples it gets, whether its input has a gradient."""

    name: str
    channels: int
    filters: int
    samples: int
    inner: bool
    kernel: int = 9


LAYERS = (Layer("first", 6, 16, 128, inner=False), Layer("second", 16, 32, 60, inner=True))


def providers(layer: Layer) -> dict[str, Provider]:
    """Name -> gradients of a fixed functional for stacked weight (S, O, C, k), bias (S, O), x (S, B, C, T)."""
    convolution = Conv(layer.channels, layer.filters, layer.kernel)
    wanted = (0, 1, 2) if layer.inner else (0, 1)

    def by_layer(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return functional_call(convolution, {"weight": weight, "bias": bias}, (x,)).sin().sum()

    def by_product(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        length = layer.samples - layer.kernel + 1
        taps = torch.stack([x[:, :, i : i + length] for i in range(layer.kernel)], dim=2)  # (B, C, k, L)
        rows = taps.permute(0, 3, 1, 2).reshape(-1, layer.channels * layer.kernel)
        return (rows @ weight.flatten(1).T + bias).sin().sum()

    def one_by_one(weight: Tensor, bias: Tensor, x: Tensor) -> Gradients:
        single = grad(by_layer, argnums=wanted)
        parts = [single(*tensors) for tensors in zip(weight, bias, x, strict=True)]
        return tuple(torch.stack(column) for column in zip(*parts, strict=True))

    return {
        "grouped": vmap(grad(by_layer, argnums=wanted)),
        "unfold": vmap(grad(by_product, argnums=wanted)),
        "one by one": one_by_one,
    }


def inputs(layer: Layer, runs: int, device: str, *, channels_innermost: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(runs, layer.filters, layer.channels, layer.kernel, generator=generator)
    bias = 0.1 * torch.randn(runs, layer.filters, generator=generator)
    x = torch.randn(runs, WINDOWS, layer.channels, layer.samples, generator=generator)
    if channels_innermost:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return weight.to(device), bias.to(device), x.to(device)


def check(found: dict[str, Gradients]) -> None:
    """All providers agree: float32 sums of at most 128 x 120 terms of order 1, eps x sqrt(15 360) x 10."""
    for name, gradients in found.items():
        for ours, expected in zip(gradients, found["one by one"], strict=True):
            error = float((ours - expected).norm() / expected.norm())
            if not error < 1.5e-4:
                raise SystemExit(f"{name} is off by {error:.1e} of the gradient: nothing was timed")


def times(kinds: dict[str, Provider], tensors: tuple[Tensor, ...], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every pass; the providers take turns."""
    cuda = tensors[0].is_cuda
    clock = time.perf_counter if cuda else time.process_time
    passes: dict[str, list[float]] = {name: [] for name in kinds}
    end = time.perf_counter() + seconds * len(kinds)
    while time.perf_counter() < end or len(passes["grouped"]) < 5:
        for name, run in kinds.items():
            start = clock()
            run(*tensors)
            if cuda:
                torch.cuda.synchronize()
            passes[name].append((clock() - start) * 1e3)
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    on = torch.cuda.get_device_name() if given.device == "cuda" else "one CPU thread"
    print(f"torch {torch.__version__} on {on}; ms of one pass of all runs, median (20 % to 80 %)")
    print("| layer | innermost | runs | grouped | unfold | one by one | unfold / grouped |")
    print("|---|---|---|---|---|---|---|")
    for layer in LAYERS:
        kinds = providers(layer)
        for innermost in (True, False):
            for runs in given.runs:
                tensors = inputs(layer, runs, given.device, channels_innermost=innermost)
                check({name: run(*tensors) for name, run in kinds.items()})
                print(row(layer, innermost, runs, times(kinds, tensors, given.seconds)), flush=True)


def row(layer: Layer, innermost: bool, runs: int, passes: dict[str, list[float]]) -> str:
    cells = []
    for name in ("grouped", "unfold", "one by one"):
        fifths = statistics.quantiles(passes[name], n=5)
        cells.append(f"{statistics.median(passes[name]):.2f} ({fifths[0]:.2f} to {fifths[-1]:.2f})")
    ratio = statistics.median(passes["unfold"]) / statistics.median(passes["grouped"])
    order = "channels" if innermost else "time"
    return f"| {layer.name} | {order} | {runs} | {' | '.join(cells)} | {ratio:.2f} |"


if __name__ == "__main__":
    main()
