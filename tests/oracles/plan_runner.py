"""The plan run in the most obvious way: dictionaries of arrays in, dictionaries out, one session a phase."""

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from wearfleet_protos.batching import batches, part_of, rng_key
from wearfleet_protos.plan import Phase, Plan
from wearfleet_protos.tensors import Digest
from wearfleet_protos.windowing import LabelledWindows

Arrays = dict[str, NDArray[np.generic]]


def run_plan(
    plan: Plan,
    graphs: Mapping[Digest, bytes],
    downloaded: Mapping[str, NDArray[np.generic]],
    persisted: Mapping[str, NDArray[np.generic]],
    windows: Mapping[str, LabelledWindows],
    *,
    round_number: int,
) -> tuple[Arrays, Arrays, dict[str, float]]:
    """State after the round, upload, metrics as ``phase/metric``."""
    state: Arrays = {}
    for spec in plan.tensors:
        if spec.copy_of and not (spec.origin == "local" and spec.name in persisted):
            state[spec.name] = state[spec.copy_of].copy()
        elif spec.origin in ("zeros", "ones"):
            state[spec.name] = np.full(spec.shape, float(spec.origin == "ones"), spec.dtype)
        else:
            source = persisted if spec.origin == "local" and spec.name in persisted else downloaded
            state[spec.name] = np.array(source[spec.name])
    start = dict(state)
    metrics: dict[str, float] = {}
    for index, phase in enumerate(plan.phases):
        if phase.when and not float(state[phase.when]) > 0.5:
            continue
        session = open_graph(graphs[phase.graph])
        chosen = part_of(phase.loop.split, windows["train"], windows["holdout"])
        for step, rows in enumerate(batches(phase.loop, plan.seed, round_number, len(chosen))):
            batch = padded(chosen, rows, phase.loop.batch_size)
            batch["rng"] = np.asarray(rng_key(plan.seed, round_number, index, step), np.int64)
            changed, sums = run_step(session, phase, state, batch)
            state |= changed
            for name, value in sums.items():
                metrics[f"{phase.name}/{name}"] = metrics.get(f"{phase.name}/{name}", 0.0) + value
    update = {s.name: np.asarray(state[s.name] - start[s.name]) for s in plan.upload_specs()}
    return state, update, metrics


def open_graph(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def padded(windows: LabelledWindows, rows: NDArray[np.int64], size: int) -> Arrays:
    x = np.zeros((size, *windows.x.shape[1:]), np.float32)
    y, weight = np.zeros(size, np.int64), np.zeros(size, np.float32)
    x[: len(rows)], y[: len(rows)], weight[: len(rows)] = windows.x[rows], windows.y[rows], 1.0
    return {"x": x, "y": y, "weight": weight}


def run_step(
    session: ort.InferenceSession, phase: Phase, state: Arrays, batch: Arrays
) -> tuple[Arrays, dict[str, float]]:
    scalars = {name: np.asarray(value, np.float32) for name, value in phase.scalars}
    kinds = {"state": state, "batch": batch, "scalar": scalars}
    feed = {b.input: kinds[b.kind][b.source] for b in phase.inputs}
    results = session.run([b.output for b in phase.outputs], feed)
    changed: Arrays = {}
    sums: dict[str, float] = {}
    for binding, result in zip(phase.outputs, results, strict=True):
        if binding.kind == "state":
            changed[binding.target] = result
        else:
            sums[binding.target] = float(result)
    return changed, sums
