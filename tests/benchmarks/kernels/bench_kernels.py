"""Every kernel against eager PyTorch and ``torch.compile``: time, memory, share of what the device can do.

    python tests/benchmarks/kernels/bench_kernels.py --device cuda [--only mmd coral] [--budget 400] --csv FILE.csv

Correctness comes first and in the same run: a provider whose result or any gradient differs from float64 by more than
the operation allows gets a row with its error and without a time; so does one at a shape whose float64 result fits
neither into the device nor into the host (its error is nan). ``--budget`` ends the run after so many seconds: shapes
not reached by then have no row, and the number of them is printed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).parent))

from measure import Ceilings, Clock, in_double, largest_error, measure_ceilings, value_and_gradients
from operation_cases import Case, Function

_OWN = {"bench_kernels", "kernel_report", "measure", "operation_cases", "stream_updates"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One provider, one part of one operation at one shape; times in microseconds, empty when the result was wrong."""

    operation: str
    size: str
    shape: str
    dtype: str
    provider: str
    part: str
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    peak_mib: float | None
    ceiling: str
    share_of_ceiling: float | None
    error: float
    device: str
    versions: str
    commit: str


@dataclass(frozen=True)
class Job:
    """One operation at one shape and dtype."""

    case: Case
    size: str
    shape: str
    sizes: Mapping[str, int]
    dtype: str


def find_cases(only: list[str]) -> list[Case]:
    """The cases of all operations, or of those named."""
    cases: list[Case] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem in _OWN or (only and path.stem not in only):
            continue
        spec = importlib.util.spec_from_file_location(f"kernel_cases_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        cases += module.CASES
    return cases


def jobs(cases: list[Case], sizes: list[str], dtypes: list[str]) -> list[Job]:
    """All of them; float32 before bfloat16 and one shape of every operation before the second, for short runs."""
    found = []
    for case in cases:
        for size, shapes in (("wearable", case.wearable), ("large", case.large)):
            for number, (shape, values) in enumerate(shapes.items()):
                if size in sizes:
                    found += [
                        (d, number, Job(case, size, shape, values, name)) for d, name in enumerate(dtypes)
                    ]
    return [job for _, _, job in sorted(found, key=lambda entry: entry[:2])]


def providers(job: Job, device: torch.device, *, compiled: bool) -> dict[str, Function]:
    """Who competes; the compiler gets the eager function and fixed shapes."""
    case = job.case
    found: dict[str, Function] = {"ours": case.ours, "eager": case.eager}
    if device.type == "cpu" and case.naive is not None:
        found["naive"] = case.naive
    if compiled:
        torch.compiler.reset()
        found["compile"] = torch.compile(case.eager, dynamic=False)
    if device.type == "cuda" and case.memory_limit is not None:
        free, _ = torch.cuda.mem_get_info(device)
        if case.memory_limit(job.sizes) > 0.8 * free:
            return {"ours": case.ours}
    return found


def measure(job: Job, clock: Clock, ceilings: Ceilings, *, compiled: bool) -> Iterator[Row]:
    """The rows of one job."""
    case, dtype = job.case, _DTYPES[job.dtype]
    generator = torch.Generator(clock.device).manual_seed(0)
    leaves, others = case.make(job.sizes, dtype, generator)
    backward = not case.no_backward
    expected = _truth(job, leaves, others)
    leaves = tuple(leaf.detach().requires_grad_(backward) for leaf in leaves)
    for provider, function in providers(job, clock.device, compiled=compiled).items():
        try:
            found = value_and_gradients(function, leaves, others, gradients=backward)
        except torch.OutOfMemoryError:
            print(f"  {provider}: out of memory", flush=True)
            torch.cuda.empty_cache()
            continue
        error = largest_error(found, expected) if expected else math.nan
        right = error <= case.relative[dtype]
        for part, call in _parts(function, leaves, others, backward=backward):
            taken = clock.time(call) if right else None
            peak = clock.peak_mib(call) if right else None
            share, ceiling = _share(job, part, taken.median if taken else None, ceilings)
            yield Row(
                case.name, job.size, job.shape, job.dtype, provider, part,
                taken and taken.median, taken and taken.p20, taken and taken.p80, peak, ceiling, share, error,
                _device_name(clock.device), _versions(), _commit(),
            )  # fmt: skip


def _truth(job: Job, leaves: tuple[Tensor, ...], others: tuple[object, ...]) -> list[Tensor]:
    """Results and gradients in float64, from the host where the device is too small; none where that is too."""
    gradients = not job.case.no_backward
    needed = 0.0 if job.case.memory_limit is None else 2 * job.case.memory_limit(job.sizes)
    places = [leaves[0].device]
    if places[0].type == "cuda" and 2 * needed < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        places.append(torch.device("cpu"))
    for place in places:
        try:
            exact, rest = in_double(leaves, place, gradients), in_double(others, place, gradients=False)
            return value_and_gradients(job.case.eager, exact, rest, gradients=gradients)  # type: ignore[arg-type]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return []


def _parts(
    function: Function, leaves: tuple[Tensor, ...], others: tuple[object, ...], *, backward: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "forward", lambda: function(*leaves, *others)
    if not backward:
        return
    value = function(*leaves, *others).sum()
    yield "backward", lambda: torch.autograd.grad(value, leaves, retain_graph=True)
    yield "both", lambda: torch.autograd.grad(function(*leaves, *others).sum(), leaves)


def _share(job: Job, part: str, microseconds: float | None, ceilings: Ceilings) -> tuple[float | None, str]:
    case, dtype = job.case, _DTYPES[job.dtype]
    if case.bound_by == "memory":
        counted, ceiling = case.bytes(job.sizes, dtype.itemsize), ceilings.copy
    else:
        counted, ceiling = case.operations(job.sizes), ceilings.product[dtype]
    amount = sum(counted.values()) if part == "both" else counted[part]  # type: ignore[index]
    share = None if microseconds is None else amount / (microseconds * 1e-6) / ceiling
    return share, f"{case.bound_by} {ceiling:.3g}/s"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _versions() -> str:
    triton = importlib.util.find_spec("triton")
    name = "triton " + __import__("triton").__version__ if triton else "no triton"
    return f"torch {torch.__version__} {name} python {platform.python_version()}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    if shutil.which("git") is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run(options: argparse.Namespace, todo: list[Job]) -> int:
    """Measure all jobs into the file; returns how many results of ours were wrong."""
    clock = Clock(torch.device(options.device), options.seconds)
    ceilings = measure_ceilings(clock)
    rates = [f"{name} {ceilings.product[dtype] / 1e12:.2f} TFLOP/s" for name, dtype in _DTYPES.items()]
    print(f"copy {ceilings.copy / 1e9:.0f} GB/s; product", ", ".join(rates), flush=True)
    begin, wrong = time.monotonic(), 0
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        writer.writeheader()
        for number, job in enumerate(todo):
            if time.monotonic() - begin > options.budget:
                print(f"the time is used up: {len(todo) - number} of {len(todo)} shapes were not measured")
                break
            print(
                f"[{number + 1}/{len(todo)}] {job.case.name} {job.size} {job.shape} {job.dtype}", flush=True
            )
            for row in measure(job, clock, ceilings, compiled=not options.without_compile):
                writer.writerow(
                    {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
                )
                file.flush()
                unknown, untimed = math.isnan(row.error), row.median_us is None
                wrong += untimed and not unknown and row.part == "forward" and row.provider == "ours"
                shown = "UNKNOWN" if unknown else "WRONG" if untimed else f"{row.median_us:10.1f} us"
                print(f"  {row.provider:8} {row.part:9} {shown}  error {row.error:.2g}", flush=True)
    return wrong


def main() -> None:
    """As the first lines of this file say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], help="names of the files beside this one")
    parser.add_argument("--sizes", nargs="*", default=["wearable", "large"])
    parser.add_argument("--dtypes", nargs="*", default=list(_DTYPES))
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.1, help="about so long for each measurement")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for the whole run")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    functorch_config.donated_buffer = False  # a backward pass is measured more than once
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    wrong = run(options, jobs(find_cases(options.only), options.sizes, options.dtypes))
    sys.exit(f"{wrong} results of ours are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
