"""Clocks, ceilings and errors for the kernel benchmark, on a CUDA device or a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FLUSH_BYTES = 256 << 20  # more than the second-level cache of any present GPU
_LEAST, _MOST = 7, 200  # repetitions of one measurement


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes a second of a copy, operations a second of a product by dtype."""

    copy: float
    product: dict[torch.dtype, float]


class Clock:
    """Measures calls on a device; on CUDA every call starts with a cold second-level cache."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._flush = (
            torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
        )

    def time(self, call: Callable[[], object]) -> Time:
        """Repeat a call for about ``seconds``, after two calls that warm up."""
        for _ in range(2):
            call()
        begin = time.perf_counter()
        call()
        self.wait()
        count = int(min(max(self.seconds / max(time.perf_counter() - begin, 1e-6), _LEAST), _MOST))
        found = self._events(call, count) if self._flush is not None else self._wall(call, count)
        low, *_, high = statistics.quantiles(found, n=5)
        return Time(statistics.median(found), low, high)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self._flush is not None:
            torch.cuda.synchronize(self.device)

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Memory of the device that one call needs beside what is there before; None on a CPU, which does not tell."""
        if self._flush is None:
            return None
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        self.wait()
        del result
        return float(torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def _events(self, call: Callable[[], object], count: int) -> list[float]:
        assert self._flush is not None
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in pairs:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    @staticmethod
    def _wall(call: Callable[[], object], count: int) -> list[float]:
        found = []
        for _ in range(count):
            begin = time.perf_counter()
            call()
            found.append((time.perf_counter() - begin) * 1e6)
        return found


def measure_ceilings(clock: Clock) -> Ceilings:
    """Copy bandwidth (bytes read and written) and the rate of square products, as PyTorch reaches them here."""
    cuda = clock.device.type == "cuda"
    source = torch.ones((1 << 30 if cuda else 1 << 27) // 4, device=clock.device)
    target = torch.zeros_like(source)
    copy = 2 * source.nbytes / (clock.time(lambda: target.copy_(source)).median * 1e-6)
    side = 8192 if cuda else 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        factor = torch.ones(side, side, device=clock.device, dtype=dtype)
        rates[dtype] = 2 * side**3 / (clock.time(lambda factor=factor: factor @ factor).median * 1e-6)
    return Ceilings(copy, rates)


def value_and_gradients(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], others: Sequence[object], *, gradients: bool
) -> list[Tensor]:
    """The result of a function and, if wanted, the gradients of its sum."""
    value = function(*leaves, *others)
    found = [value.detach()]
    if gradients:
        found += torch.autograd.grad(value.sum(), list(leaves))
    return found


def in_double(values: Sequence[object], device: torch.device, gradients: bool) -> list[object]:
    """All tensors on a device, the floating ones as copies in float64; the others as they are."""
    return [
        value.detach().to(device, torch.float64).requires_grad_(gradients)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for value in values
    ]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any result or gradient, relative to the largest value of that tensor; NaN counts as inf."""
    worst = 0.0
    for ours, exact in zip(found, expected, strict=True):
        scale = exact.abs().max().clamp_min(1e-30)
        error = float(((ours.to(exact.device).double() - exact).abs().max() / scale).item())
        worst = max(worst, error if error == error else float("inf"))  # noqa: PLR0124  NaN is not itself
    return worst
