"""A plan's training step in ONNX Runtime against the same step in eager torch, one thread each.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/bench_plan.py [--steps 200] [--csv FILE]`` from the repository root.
Providers, interleaved in blocks so that a busy machine slows all alike:

* ``plan``: ONNX Runtime with IO binding; the state stays in ONNX Runtime, two buffers a tensor.
* ``torch``: ``model(x)``, ``backward``, ``torch.optim``: what a device would run if it had torch. Fastest form:
  no window weights, so the native batch normalisation.
* ``torch, weighted``: the same with window weights, as a short last batch needs.

Before any timing all three must agree after ten steps.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.plan_runner import open_graph
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_models.classifier import Classifier, ModelSpec, build_classifier
from wearfleet_protos.plan import InputContract
from wearfleet_protos.recording import Channel

CHANNELS, WINDOW, CLASSES, BATCH = 6, 128, 6, 32
CONTRACT = InputContract(
    tuple(Channel(f"channel{i}", "1") for i in range(CHANNELS)), 50.0, WINDOW, 64, tuple("abcdef")
)
OPTIMISERS: dict[str, dict[str, object]] = {
    "sgd": {"learning_rate": 0.01},
    "momentum": {"learning_rate": 0.01, "momentum": 0.9},
    "adam": {"optimiser": "adam", "learning_rate": 1e-3},
}
Step = Callable[[int], object]


@dataclass(frozen=True)
class Case:
    """One backbone with one optimiser."""

    backbone: str
    optimiser: str

    def model(self) -> Classifier:
        """Always the same initial weights."""
        return build_classifier(ModelSpec(self.backbone, CHANNELS, WINDOW, CLASSES))  # type: ignore[arg-type]


def batches() -> list[dict[str, np.ndarray]]:
    """Sixteen batches, all windows of weight one."""
    generator = np.random.default_rng(0)
    return [
        {
            "x": generator.normal(size=(BATCH, CHANNELS, WINDOW)).astype(np.float32),
            "y": generator.integers(0, CLASSES, BATCH),
            "weight": np.ones(BATCH, np.float32),
            "rng": np.asarray(1000 + i, np.int64),
        }
        for i in range(16)
    ]


def plan_step(case: Case) -> tuple[Step, Callable[[], np.ndarray], int]:
    """A step, a reader of the head's weights, and the size of the graph."""
    model = case.model()
    strategy = create_strategy("fedavg", {"batch_size": BATCH, **OPTIMISERS[case.optimiser]})
    plan, graphs = build_plan(strategy, model, CONTRACT, plan_id="bench")
    (phase,) = (p for p in plan.phases if p.name == "train")
    session = open_graph(graphs[phase.graph])
    first = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    buffers = [
        {
            s.name: ort.OrtValue.ortvalue_from_numpy(first.get(s.name, np.zeros(s.shape, s.dtype)))
            for s in plan.tensors
        }
        for _ in range(2)
    ]
    data = [{name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in batch.items()} for batch in batches()]
    scalars = {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(v, np.float32)) for name, v in phase.scalars}
    changing = {b.target for b in phase.outputs if b.kind == "state"}
    bindings = []
    for read, write in (buffers, reversed(buffers)):
        binding = session.io_binding()
        for b in phase.inputs:
            if b.kind == "state":
                binding.bind_ortvalue_input(b.input, (read if b.source in changing else buffers[0])[b.source])
            elif b.kind == "scalar":
                binding.bind_ortvalue_input(b.input, scalars[b.source])
        for b in phase.outputs:
            if b.kind == "state":
                binding.bind_ortvalue_output(b.output, write[b.target])
            else:
                binding.bind_output(b.output)
        bindings.append(binding)
    fed = [b for b in phase.inputs if b.kind == "batch"]

    def step(index: int) -> object:
        binding, batch = bindings[index % 2], data[index % len(data)]
        for b in fed:
            binding.bind_ortvalue_input(b.input, batch[b.source])
        session.run_with_iobinding(binding)
        return binding

    return step, buffers[0]["head.weight"].numpy, len(graphs[phase.graph])


def torch_step(case: Case, *, weighted: bool) -> tuple[Step, Callable[[], np.ndarray]]:
    """A step and a reader of the head's weights."""
    model = case.model().train()
    options = OPTIMISERS[case.optimiser]
    rate = float(str(options["learning_rate"]))
    optimiser: torch.optim.Optimizer
    if case.optimiser == "adam":
        optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    else:
        optimiser = torch.optim.SGD(
            model.parameters(), lr=rate, momentum=float(str(options.get("momentum", 0)))
        )
    data = [{name: torch.from_numpy(a) for name, a in batch.items()} for batch in batches()]
    for (
        batch
    ) in data:  # channels side by side in memory: the order in which the model's own layers are fastest
        batch["x"] = batch["x"].transpose(1, 2).contiguous().transpose(1, 2)

    def step(index: int) -> object:
        batch = data[index % len(data)]
        optimiser.zero_grad()
        if weighted:
            logits = model(batch["x"], batch["weight"], batch["rng"])
            each = F.cross_entropy(logits, batch["y"], reduction="none")
            loss = (each * batch["weight"]).sum() / batch["weight"].sum()
        else:
            loss = F.cross_entropy(model(batch["x"], None, batch["rng"]), batch["y"])
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step, model.head.weight.detach().numpy


def milliseconds(steps: dict[str, Step], number: int, block: int = 20) -> dict[str, np.ndarray]:
    """Time of each step, providers taking turns in blocks."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for begin in range(0, number, block):
        for name, step in steps.items():
            for index in range(begin, begin + block):
                start = time.perf_counter()
                step(index)
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: np.asarray(values[block:]) for name, values in taken.items()}


def measure(case: Case, number: int) -> Iterator[dict[str, object]]:
    """Rows of one case; stops when the providers disagree."""
    plan, plan_weights, graph_bytes = plan_step(case)
    eager, eager_weights = torch_step(case, weighted=False)
    weighted, weighted_weights = torch_step(case, weighted=True)
    for index in range(10):
        plan(index), eager(index), weighted(index)
    for weights in (eager_weights(), weighted_weights()):
        error = np.linalg.norm(plan_weights() - weights) / np.linalg.norm(weights)
        if error > 1e-5:
            sys.exit(f"{case}: plan and torch differ by {error:.1e} after ten steps")
    times = milliseconds({"plan": plan, "torch": eager, "torch, weighted": weighted}, number)
    reference = float(np.median(times["torch"]))
    for provider, values in times.items():
        low, middle, high = np.percentile(values, [20, 50, 80])
        yield {
            "op": f"training step, {case.backbone}, {case.optimiser}",
            "provider": provider,
            "pass": "full",
            "metric": "time",
            "unit": "ms",
            "shape": f"({BATCH}, {CHANNELS}, {WINDOW})",
            "dtype": "float32",
            "p20": round(float(low), 3),
            "p50": round(float(middle), 3),
            "p80": round(float(high), 3),
            "torch_over_this": round(reference / float(middle), 2),
            "graph_bytes": graph_bytes if provider == "plan" else "",
        }


def surroundings() -> dict[str, object]:
    """Where and with what the numbers were taken."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": platform.processor() or platform.machine(),
        "versions": f"torch {torch.__version__}, onnxruntime {ort.__version__}, python {platform.python_version()}",
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    print(f"{'step':34} {'provider':16} {'p20':>7} {'p50':>7} {'p80':>7} ms  torch / this")
    for backbone in ("cnn", "transformer"):
        for optimiser in OPTIMISERS:
            for row in measure(Case(backbone, optimiser), arguments.steps):
                rows.append({**row, **surroundings()})
                print(
                    f"{row['op']:34} {row['provider']:16} {row['p20']:7} {row['p50']:7} {row['p80']:7}"
                    f"     {row['torch_over_this']}",
                    flush=True,
                )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(f"load average {os.getloadavg()[0]:.1f}; {len(rows)} rows")


if __name__ == "__main__":
    main()
