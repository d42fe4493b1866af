"""Time to recognise one window, batch 1, one thread: exported float32 and int8 against eager torch.

Run: ``python tests/benchmarks/bench_inference.py [--out FILE.csv] [--repeats N]`` from the repository root. A case is
timed only after its export agreed with torch. Providers take turns, so that a busy moment hits all of them; the
fastest of the turns counts for p50, all calls for p99.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from wearfleet_cloud.export import ReleaseInfo, export_classifier
from wearfleet_cloud.export.ood_score import DEFAULT_RANK
from wearfleet_cloud.export.quantize import quantize
from wearfleet_cloud.export.session import Session
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel

TURNS = 5
COLUMNS = (
    "op",
    "provider",
    "backbone",
    "shape",
    "p50_us",
    "p99_us",
    "size_bytes",
    "device",
    "versions",
    "commit",
    "time",
)


def windows(channels: int, length: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Oscillations of one frequency a class: enough for a calibration that is not degenerate."""
    rng = np.random.default_rng(0)
    y = np.arange(480) % classes
    phase = rng.uniform(0, 2 * np.pi, (480, channels, 1))
    x = np.sin(2 * np.pi * (1 + y[:, None, None]) * np.arange(length) / length + phase)
    return (x + rng.normal(0, 0.3, x.shape)).astype(np.float32), y.astype(np.int64)


def exported(spec: ModelSpec, method: str, rank: int) -> tuple[bytes, object]:
    """One checked export; the first half of the windows trains nothing but the score's statistics."""
    x, y = windows(spec.channels, spec.window, spec.classes)
    contract = InputContract(
        tuple(Channel(f"axis{i}", "m/s^2") for i in range(spec.channels)),
        50.0,
        spec.window,
        spec.window // 2,
        tuple(f"class{i}" for i in range(spec.classes)),
    )
    info = ReleaseInfo("bench", 1, "bench", "Apache-2.0", simulated=True, created_ns=0)
    model = build_classifier(spec).eval()
    release = export_classifier(
        model, contract, info, x=x[:240], y=y[:240], x_validation=x[240:], method=method, rank=rank
    )
    return release.data, release.manifest


def int8_of(data: bytes, manifest: object, spec: ModelSpec) -> bytes:
    x, y = windows(spec.channels, spec.window, spec.classes)
    halves = {"x": x[:240], "y": y[:240], "x_validation": x[240:], "y_validation": y[240:]}
    return quantize(data, manifest, **halves, budget=1.0).data


def eager(spec: ModelSpec, window: np.ndarray) -> Callable[[int], np.ndarray]:
    """Times of the classifier alone in eager torch, without score and probabilities."""
    model, x = build_classifier(spec).eval(), torch.from_numpy(window)

    def run(repeats: int) -> np.ndarray:
        with torch.inference_mode():
            return times_of(lambda: model(x), repeats)

    return run


def times_of(call: Callable[[], object], repeats: int) -> np.ndarray:
    times = np.empty(repeats)
    for index in range(repeats):
        begin = time.perf_counter_ns()
        call()
        times[index] = (time.perf_counter_ns() - begin) / 1e3
    return times


def onnx(data: bytes, window: np.ndarray) -> Callable[[int], np.ndarray]:
    session = Session(data)
    return lambda repeats: session.times_us(window, repeats)


def case(spec: ModelSpec, repeats: int) -> list[dict[str, object]]:
    window = windows(spec.channels, spec.window, spec.classes)[0][:1]
    energy, energy_manifest = exported(spec, "energy", 1)
    distance, manifest = exported(spec, "mahalanobis", DEFAULT_RANK)
    full, _ = exported(spec, "mahalanobis", 1_000_000)
    int8 = int8_of(distance, manifest, spec)
    int8_energy = int8_of(energy, energy_manifest, spec)
    graphs = {
        f"ORT float32, mahalanobis rank {DEFAULT_RANK} (default)": distance,
        "ORT float32, mahalanobis full rank": full,
        "ORT float32, energy": energy,
        f"ORT int8, mahalanobis rank {DEFAULT_RANK}": int8,
        "ORT int8, energy": int8_energy,
    }
    providers = {name: onnx(data, window) for name, data in graphs.items()} | {
        "eager torch, logits only": eager(spec, window)
    }
    for run in providers.values():
        run(300)
    turns = {name: [] for name in providers}
    for _ in range(TURNS):
        for name, run in providers.items():
            turns[name].append(run(repeats))
    shape = f"1x{spec.channels}x{spec.window}"
    return [
        {
            "op": "recognise",
            "provider": name,
            "backbone": spec.backbone,
            "shape": shape,
            "p50_us": round(float(min(np.median(turn) for turn in turns[name])), 1),
            "p99_us": round(float(np.percentile(np.concatenate(turns[name]), 99)), 1),
            "size_bytes": len(graphs.get(name, b"")) or "",
        }
        for name in providers
    ]


def surroundings() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": f"onnxruntime {ort.__version__}, torch {torch.__version__}, python {platform.python_version()}",
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/inference.csv"))
    parser.add_argument("--repeats", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    specs = (
        ModelSpec("cnn", 6, 128, 6),
        ModelSpec("cnn", 6, 200, 12, kernel=6),
        ModelSpec("transformer", 6, 128, 6),
    )
    rows = [row for spec in specs for row in case(spec, given.repeats)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, **surroundings()} for row in rows)
    print(f"{'backbone':12} {'window':10} {'provider':42} {'p50 us':>8} {'p99 us':>8} {'bytes':>9}")
    for row in rows:
        print(
            f"{row['backbone']:12} {row['shape']:10} {row['provider']:42} {row['p50_us']:8.1f} {row['p99_us']:8.1f} "
            f"{row['size_bytes']!s:>9}"
        )
    print(f"written to {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
