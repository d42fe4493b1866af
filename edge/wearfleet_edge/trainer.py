"""Run a plan with ONNX Runtime and NumPy: the device's whole training engine.

State tensors stay inside ONNX Runtime: each has two buffers, a step reads one and writes the other, then they swap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from wearfleet_protos.batching import part_of, rng_key
from wearfleet_protos.errors import DeniedError, IntegrityError, ProtocolError
from wearfleet_protos.plan import Phase, Plan
from wearfleet_protos.privacy import protected, secret_generator
from wearfleet_protos.records import SecretSource, Source, expected_batch, steps_of
from wearfleet_protos.tensors import NO_RANK_LIMIT, Digest, check_finite, constant_start, digest_of

from wearfleet_edge.graph import inspect_graph
from wearfleet_edge.runtime import make_session

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from wearfleet_protos.windowing import LabelledWindows

    Tensors = dict[str, NDArray[np.generic]]

__all__ = [
    "Limits",
    "PlanResult",
    "TrainingData",
    "personal_tensors",
    "run_plan",
    "start_state",
    "upload_tensors",
]

_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_BATCH_TYPES: Final = {
    "x": "float32",
    "y": "int64",
    "weight": "float32",
    "rng": "int64",
    "noise": "float32",
    "expected": "float32",
}


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Labelled windows of the wearer: an earlier part to learn from, a later part only to measure."""

    train: LabelledWindows
    holdout: LabelledWindows


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device allows a plan, whatever the plan's own budget says.

    Args:
        seconds: longest computation.
        memory_bytes: resident memory above which it stops.
        resident_bytes: tells the present resident memory.
        monotonic: clock, seconds.
        stopped: True when the agent is asked to stop.
    """

    seconds: float
    memory_bytes: float
    resident_bytes: Callable[[], int]
    monotonic: Callable[[], float]
    stopped: Callable[[], bool]


@dataclass(frozen=True, slots=True, eq=False)
class PlanResult:
    """What a plan left behind.

    Args:
        state: every state tensor by name.
        metrics: ``phase/metric`` to value.
        num_examples: training windows it had.
        num_steps: steps of phases that change state.
        seconds: time of computation.
    """

    state: Tensors
    metrics: dict[str, float]
    num_examples: int
    num_steps: int
    seconds: float


def start_state(
    plan: Plan, downloaded: Tensors, local: Tensors, *, max_lora_rank: int = NO_RANK_LIMIT
) -> Tensors:
    """First value of every state tensor.

    Args:
        plan: the plan.
        downloaded: tensors of ``plan.download_specs()``, checked.
        local: tensors the device kept from an earlier round, checked; may be empty.
        max_lora_rank: highest rank of low-rank factors that the device trains, at least 1.

    Returns:
        Arrays by name; nothing is shared with the arguments.
    """
    state: Tensors = {}
    for spec in plan.tensors:
        kept = local.get(spec.name) if spec.origin == "local" else None
        if kept is not None:
            state[spec.name] = np.array(kept)
        elif spec.origin in ("zeros", "ones"):
            state[spec.name] = constant_start(spec, max_lora_rank)
        elif not spec.copy_of:
            state[spec.name] = np.array(downloaded[spec.name])
    for spec in plan.tensors:
        if spec.name not in state:
            source = state.get(spec.copy_of)
            if source is None or source.shape != spec.shape or source.dtype != np.dtype(spec.dtype):
                raise ProtocolError(f"tensor {spec.name} cannot be a copy of {spec.copy_of}")
            state[spec.name] = source.copy()
    return state


def upload_tensors(plan: Plan, before: Tensors, after: Tensors) -> Tensors:
    """The tensors that go back, as difference to ``before`` or as value; clipped and noised if the plan says so.

    Raises:
        ShapeError: a value is not finite: training diverged.
    """
    names = [spec.name for spec in plan.upload_specs()]
    if plan.upload.form == "delta":
        chosen = {name: np.asarray(np.subtract(after[name], before[name])) for name in names}
    else:
        chosen = {name: after[name] for name in names}
    check_finite(chosen)
    if plan.upload.clip:
        return protected(chosen, plan.upload.clip, plan.upload.noise, secret_generator())
    return chosen


def run_plan(
    plan: Plan,
    graphs: Mapping[Digest, bytes],
    state: Tensors,
    data: TrainingData,
    *,
    round_number: int,
    limits: Limits,
    source: Source | None = None,
) -> PlanResult:
    """Run all phases of a plan.

    Args:
        plan: verified plan.
        graphs: ONNX bytes of every graph that the plan names.
        state: first values from :func:`start_state`; not changed.
        data: windows that fit ``plan.contract``.
        round_number: goes into shuffling and random numbers.
        limits: of this device.
        source: of secret batches and their noise; None for the operating system's. A simulation that shall be
            repeated gives its own, and protects nobody.

    Raises:
        IntegrityError: a graph is not the promised one, or not allowed.
        ProtocolError: a graph does not fit the plan's tensors.
        DeniedError: too few windows, or a limit was reached.
        ShapeError: training diverged to values that are not finite.
    """
    if len(data.train) < plan.budget.min_examples:
        raise DeniedError(
            f"the plan wants at least {plan.budget.min_examples} windows, here are {len(data.train)}"
        )
    begin = limits.monotonic()
    drawn = SecretSource() if source is None else source
    cells = _Cells(plan, state)
    metrics: dict[str, float] = {}
    steps = 0
    for index, phase in enumerate(plan.phases):
        if phase.when and not cells.number(phase.when) > 0.5:
            continue
        program = _PhaseProgram(plan, phase, _verified(graphs, phase), cells)
        windows = part_of(phase.loop.split, data.train, data.holdout)
        program.expect(expected_batch(phase.loop, len(windows)))
        chosen = steps_of(phase.loop, plan.seed, round_number, len(windows), drawn)
        for step, rows in enumerate(chosen):
            program.step(windows, rows, rng_key(plan.seed, round_number, index, step), drawn)
            _enforce(plan, limits, begin)
        steps += len(chosen) if program.changes_state else 0
        metrics |= {f"{phase.name}/{name}": value for name, value in program.metrics.items()}
    final = cells.read()
    check_finite(final)
    return PlanResult(final, metrics, len(data.train), steps, limits.monotonic() - begin)


def _verified(graphs: Mapping[Digest, bytes], phase: Phase) -> bytes:
    graph = graphs[phase.graph]
    if len(graph) != phase.graph_bytes or digest_of(graph) != phase.graph:
        raise IntegrityError(f"the graph of phase {phase.name} is not the one that the plan names")
    inspect_graph(graph)
    return graph


def _enforce(plan: Plan, limits: Limits, begin: float) -> None:
    allowed = min(plan.budget.seconds, limits.seconds)
    if limits.monotonic() - begin > allowed:
        raise DeniedError(f"the plan took longer than the {allowed:g} s it may")
    if limits.resident_bytes() > limits.memory_bytes:
        raise DeniedError(f"the plan needs more than {limits.memory_bytes / 1e6:.0f} MB of memory")
    if limits.stopped():
        raise DeniedError("the agent is stopping")


class _Cells:
    """Two buffers a state tensor: the present value, and where the next step writes.

    Values are copied on the way in and out, because ONNX Runtime may share memory with NumPy.
    """

    def __init__(self, plan: Plan, state: Tensors) -> None:
        self.specs = {spec.name: spec for spec in plan.tensors}
        self.present = {name: ort.OrtValue.ortvalue_from_numpy(state[name].copy()) for name in self.specs}
        self.spare: dict[str, ort.OrtValue] = {}

    def reserve(self, name: str) -> None:
        """Make sure that a tensor has a second buffer."""
        if name not in self.spare:
            self.spare[name] = ort.OrtValue.ortvalue_from_numpy(self.present[name].numpy().copy())

    def swap(self, name: str) -> None:
        """What was written becomes the present value."""
        self.present[name], self.spare[name] = self.spare[name], self.present[name]

    def number(self, name: str) -> float:
        """The present value of a scalar."""
        return float(self.present[name].numpy())

    def read(self) -> Tensors:
        """Copies of all present values."""
        return {name: np.array(value.numpy()) for name, value in self.present.items()}


class _PhaseProgram:
    """One phase's graph, bound to the state."""

    def __init__(self, plan: Plan, phase: Phase, graph: bytes, cells: _Cells) -> None:
        self._phase = phase
        self._cells = cells
        self._session = make_session(graph)
        self._binding = self._session.io_binding()
        self._state_in = {b.input: b.source for b in phase.inputs if b.kind == "state"}
        self._state_out = {b.output: b.target for b in phase.outputs if b.kind == "state"}
        self._metric_out = {b.output: b for b in phase.outputs if b.kind == "metric"}
        self._check(plan)
        batch = phase.loop.batch_size
        shape = len(plan.contract.channels), plan.contract.window
        self._x = np.zeros((batch, *shape), np.float32)
        self._y = np.zeros(batch, np.int64)
        self._weight = np.zeros(batch, np.float32)
        self._noise = np.zeros(phase.noise, np.float32)
        self._batch = {
            "x": ort.OrtValue.ortvalue_from_numpy(self._x),
            "y": ort.OrtValue.ortvalue_from_numpy(self._y),
            "weight": ort.OrtValue.ortvalue_from_numpy(self._weight),
            "rng": ort.OrtValue.ortvalue_from_numpy(np.zeros((), np.int64)),
            "noise": ort.OrtValue.ortvalue_from_numpy(self._noise),
            "expected": ort.OrtValue.ortvalue_from_numpy(np.zeros((), np.float32)),
        }
        self._scalars = {
            n: ort.OrtValue.ortvalue_from_numpy(np.array(v, np.float32)) for n, v in phase.scalars
        }
        self._metric_values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros((), np.float32)) for name in self._metric_out
        }
        self.metrics = {b.target: 0.0 for b in self._metric_out.values()}
        for name in self._state_out.values():
            cells.reserve(name)
        self._bind_constants()

    @property
    def changes_state(self) -> bool:
        """False for a phase that only measures."""
        return bool(self._state_out)

    def expect(self, size: float) -> None:
        """Tell the mean size of the batches that follow."""
        self._batch["expected"].update_inplace(np.array(size, np.float32))

    def step(self, windows: LabelledWindows, rows: NDArray[np.int64], key: int, source: Source) -> None:
        """Run the graph on the windows at ``rows`` (n <= batch size); the rest of the batch weighs nothing."""
        n = len(rows)
        for buffer, values in ((self._x, windows.x[rows]), (self._y, windows.y[rows]), (self._weight, 1.0)):
            buffer[:n] = values
            buffer[n:] = 0
        self._batch["x"].update_inplace(self._x)
        self._batch["y"].update_inplace(self._y)
        self._batch["weight"].update_inplace(self._weight)
        self._batch["rng"].update_inplace(np.array(key, np.int64))
        if self._noise.size:
            self._noise[:] = source.standard_normal(self._noise.size)
            self._batch["noise"].update_inplace(self._noise)
        for name, tensor in self._state_in.items():
            self._binding.bind_ortvalue_input(name, self._cells.present[tensor])
        for name, target in self._state_out.items():
            self._binding.bind_ortvalue_output(name, self._cells.spare[target])
        self._session.run_with_iobinding(self._binding)
        for target in self._state_out.values():
            self._cells.swap(target)
        for name, binding in self._metric_out.items():
            value = float(self._metric_values[name].numpy())
            self.metrics[binding.target] = value + (
                self.metrics[binding.target] if binding.reduce == "sum" else 0.0
            )

    def _bind_constants(self) -> None:
        for binding in self._phase.inputs:
            if binding.kind == "batch":
                self._binding.bind_ortvalue_input(binding.input, self._batch[binding.source])
            elif binding.kind == "scalar":
                self._binding.bind_ortvalue_input(binding.input, self._scalars[binding.source])
        for name, value in self._metric_values.items():
            self._binding.bind_ortvalue_output(name, value)

    def _check(self, plan: Plan) -> None:
        """The graph's inputs and outputs must be exactly what the plan says, in type and shape."""
        batch = (self._phase.loop.batch_size,)
        channels, window = len(plan.contract.channels), plan.contract.window
        batch_shapes = {
            "x": (*batch, channels, window),
            "y": batch,
            "weight": batch,
            "rng": (),
            "expected": (),
        }
        batch_shapes["noise"] = (self._phase.noise,)
        wanted_in: dict[str, tuple[str, tuple[int, ...]]] = {}
        for binding in self._phase.inputs:
            if binding.kind == "state":
                spec = self._cells.specs[binding.source]
                wanted_in[binding.input] = spec.dtype, spec.shape
            elif binding.kind == "batch":
                wanted_in[binding.input] = _BATCH_TYPES[binding.source], batch_shapes[binding.source]
            else:
                wanted_in[binding.input] = "float32", ()
        wanted_out: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(self._metric_out, ("float32", ()))
        for name, target in self._state_out.items():
            wanted_out[name] = self._cells.specs[target].dtype, self._cells.specs[target].shape
        for what, nodes, wanted in (
            ("input", self._session.get_inputs(), wanted_in),
            ("output", self._session.get_outputs(), wanted_out),
        ):
            found = {n.name: (_TYPES.get(n.type, n.type), tuple(n.shape)) for n in nodes}
            wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            if wrong:
                raise ProtocolError(
                    f"phase {self._phase.name}: {what} {wrong[0]!r} should be {wanted.get(wrong[0])}, "
                    f"the graph has {found.get(wrong[0])}"
                )


def personal_tensors(plan: Plan, state: Tensors) -> Tensors:
    """Parameters and buffers of a trained state, in the device's own version: what a model becomes personal with."""
    return {name: state[own] for name, own in plan.personal_names().items()}
