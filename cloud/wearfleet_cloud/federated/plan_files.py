"""A plan as a folder: ``plan.json`` and ``graphs/<digest>.onnx``; and the check that the two fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from wearfleet_protos.errors import IntegrityError, NotFoundError, ProtocolError
from wearfleet_protos.plan import Phase, Plan
from wearfleet_protos.tensors import Digest, digest_of

__all__ = ["PhaseReport", "check_plan", "load_plan", "save_plan"]

_PLAN_FILE: Final = "plan.json"
_GRAPH_FOLDER: Final = "graphs"

Signature = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """What a checked phase consists of: operators by name, and how many tensors it reads and writes."""

    name: str
    graph: Digest
    graph_bytes: int
    operators: dict[str, int]
    reads: int
    writes: int


def save_plan(folder: Path, plan: Plan, graphs: Mapping[Digest, bytes]) -> None:
    """Write a plan and its graphs; the plan comes last, so that a folder with one is whole."""
    (folder / _GRAPH_FOLDER).mkdir(parents=True, exist_ok=True)
    for digest, data in graphs.items():
        _graph_file(folder, digest).write_bytes(data)
    (folder / _PLAN_FILE).write_bytes(plan.to_bytes())


def load_plan(folder: Path) -> tuple[Plan, dict[Digest, bytes]]:
    """Read a folder written by ``save_plan``.

    Raises:
        NotFoundError: the plan or one of its graphs is missing.
        ProtocolError: the document is not a plan.
        IntegrityError: a graph is not the one that the plan names.
    """
    plan = Plan.from_bytes(_read(folder / _PLAN_FILE))
    graphs: dict[Digest, bytes] = {}
    for phase in plan.phases:
        data = _read(_graph_file(folder, phase.graph))
        if digest_of(data) != phase.graph or len(data) != phase.graph_bytes:
            raise IntegrityError(
                f"graph of phase {phase.name} has digest {digest_of(data)} and {len(data)} bytes, the plan names "
                f"{phase.graph} with {phase.graph_bytes}; build the plan again"
            )
        graphs[phase.graph] = data
    return plan, graphs


def check_plan(plan: Plan, graphs: Mapping[Digest, bytes]) -> tuple[PhaseReport, ...]:
    """Check that every graph is valid, standard, and takes and gives exactly what the plan binds.

    Raises:
        IntegrityError: a graph is not valid ONNX or holds an operator that is not standard.
        ProtocolError: an input or output of a graph does not fit the plan.
    """
    return tuple(_check_phase(plan, phase, graphs[phase.graph]) for phase in plan.phases)


def _check_phase(plan: Plan, phase: Phase, data: bytes) -> PhaseReport:
    try:
        model = onnx.load_model_from_string(data)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the parser and the checker share no base class
        raise IntegrityError(f"graph of phase {phase.name} is not a valid ONNX model: {error}") from error
    foreign = sorted({o.domain for o in model.opset_import if o.domain not in ("", "ai.onnx")})
    if foreign:
        raise IntegrityError(
            f"graph of phase {phase.name} uses operators of {foreign[0]!r}, only standard ones run"
        )
    wanted_in, wanted_out = _bound(plan, phase)
    _compare(phase, "input", {v.name: _signature(v) for v in model.graph.input}, wanted_in)
    _compare(phase, "output", {v.name: _signature(v) for v in model.graph.output}, wanted_out)
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    writes = sum(b.kind == "state" for b in phase.outputs)
    reads = sum(b.kind == "state" for b in phase.inputs)
    return PhaseReport(phase.name, phase.graph, len(data), dict(sorted(operators.items())), reads, writes)


def _bound(plan: Plan, phase: Phase) -> tuple[dict[str, Signature], dict[str, Signature]]:
    """Type and shape of every input and output as the plan binds it."""
    size = phase.loop.batch_size
    tensors: dict[str, Signature] = {s.name: (s.dtype, s.shape) for s in plan.tensors}
    batch: dict[str, Signature] = {
        "x": ("float32", (size, len(plan.contract.channels), plan.contract.window)),
        "y": ("int64", (size,)),
        "weight": ("float32", (size,)),
        "rng": ("int64", ()),
    }
    kinds: dict[str, dict[str, Signature]] = {
        "state": tensors,
        "batch": batch,
        "scalar": {name: ("float32", ()) for name, _ in phase.scalars},
    }
    inputs = {b.input: kinds[b.kind][b.source] for b in phase.inputs}
    number: Signature = ("float32", ())
    return inputs, {b.output: tensors[b.target] if b.kind == "state" else number for b in phase.outputs}


def _signature(value: onnx.ValueInfoProto) -> Signature:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return str(dtype), tuple(d.dim_value for d in kind.shape.dim)


def _compare(
    phase: Phase, what: str, found: Mapping[str, Signature], wanted: Mapping[str, Signature]
) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ProtocolError(
                f"phase {phase.name}: {what} {name!r} is {found.get(name)} in the graph and "
                f"{wanted.get(name)} in the plan"
            )


def _graph_file(folder: Path, digest: Digest) -> Path:
    return folder / _GRAPH_FOLDER / f"{digest.removeprefix('sha256:')}.onnx"


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"{file} cannot be read ({error.strerror}); give the folder of `plan build`"
        ) from error
