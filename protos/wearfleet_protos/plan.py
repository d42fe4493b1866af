"""The plan: a federated algorithm as data. A short program of ONNX graphs over named tensors with roles.

A device runs it with ONNX Runtime and NumPy alone and never learns the algorithm's name from it. The order of the
windows and the keys of random numbers, on which torch and the device must agree to the bit, are in ``batching``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import numpy as np

from wearfleet_protos.batching import Split
from wearfleet_protos.canonical import canonical_json, parse_json, take
from wearfleet_protos.codecs import FLOAT32, DownloadFormat, UpdateCodec, UpdateFormat
from wearfleet_protos.errors import ProtocolError, WearfleetError
from wearfleet_protos.recording import Channel
from wearfleet_protos.tensors import (
    Digest,
    Origin,
    TensorGroup,
    TensorRole,
    TensorSpec,
    parse_digest,
)

__all__ = [
    "BATCH_INPUTS",
    "PLAN_MEDIA_TYPE",
    "Budget",
    "InputBinding",
    "InputContract",
    "Loop",
    "OutputBinding",
    "Phase",
    "Plan",
    "UploadSpec",
    "tensor_spec_from_json",
]

PLAN_MEDIA_TYPE: Final = "application/vnd.wearfleet.plan.v1+json"
BATCH_INPUTS: Final = ("x", "y", "weight", "rng", "noise", "expected")
"""x (B, C, T) float32; y (B,) int64; weight (B,) float32, 0 for padding; rng () int64 key of the step. Secret batches
have noise (``Phase.noise``,) float32, standard normal numbers that the device draws from its own secret source,
and expected () float32, the mean size of a batch (``records.expected_batch``)."""

_MODEL_GROUPS: Final = (TensorGroup.PARAM, TensorGroup.BUFFER)
_MAX_TENSORS: Final = 10_000
_MAX_PHASES: Final = 32


@dataclass(frozen=True, slots=True)
class InputContract:
    """What a window must look like: channels with units, rate and length."""

    channels: tuple[Channel, ...]
    rate_hz: float
    window: int
    stride: int
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InputBinding:
    """Feeds graph input ``input`` from a state tensor, a batch tensor (:data:`BATCH_INPUTS`) or a scalar."""

    input: str
    kind: Literal["state", "batch", "scalar"]
    source: str


@dataclass(frozen=True, slots=True)
class OutputBinding:
    """Stores graph output ``output`` in a state tensor, or accumulates it as a metric of the phase."""

    output: str
    kind: Literal["state", "metric"]
    target: str
    reduce: Literal["sum", "last"] = "last"


@dataclass(frozen=True, slots=True)
class Loop:
    """How often a phase's graph runs, and on which windows.

    Args:
        split: ``train`` (the earlier part of the wearer's recording), ``holdout`` (the later part), or a part of
            ``train``: ``select`` (every fifth window, to decide by) and ``fit`` (the others); see ``batching.part_of``.
        batch_size: B; the last short batch is padded with zeros of weight 0.
        epochs: passes over the split.
        max_steps: stop after so many steps; 0 means no limit.
        shuffle: permute the windows each epoch with :func:`wearfleet_protos.batching.shuffle_order`.
        sampling_rate: above 0 there are no passes: each of ``max_steps`` steps has a batch that the device draws in
            secret, in which each window is with this probability (``records``); B is then the largest size.
    """

    split: Split
    batch_size: int
    epochs: int
    max_steps: int
    shuffle: bool
    sampling_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One graph run in a loop; if ``when`` names a state tensor () float32, only where that is above 1/2.

    ``noise`` is how many secret normal numbers a step with a secret batch takes; 0 where batches are no secret.
    """

    name: str
    graph: Digest
    graph_bytes: int
    inputs: tuple[InputBinding, ...]
    outputs: tuple[OutputBinding, ...]
    loop: Loop
    scalars: tuple[tuple[str, float], ...]
    when: str = ""
    noise: int = 0


@dataclass(frozen=True, slots=True)
class UploadSpec:
    """What goes back: tensors of these roles and groups, as difference to the start value or as value, in a codec.

    Only differences can be coded with loss, or protected.

    Args:
        roles: of the tensors.
        groups: of the tensors.
        form: difference or value.
        codec: how they are written.
        clip: the device shortens the update to this joint norm; 0 for as it is.
        noise: standard deviation of what the device then adds to every coordinate, from a generator of its own.
    """

    roles: tuple[TensorRole, ...]
    groups: tuple[TensorGroup, ...]
    form: Literal["delta", "value"]
    codec: UpdateCodec = FLOAT32
    clip: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that the device enforces: wall seconds, bytes on the wire, fewest training windows."""

    seconds: float
    max_bytes: int
    min_examples: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole federated client algorithm; see the module's docstring.

    Args:
        plan_id: unique name.
        strategy: name of the algorithm, for people.
        strategy_version: of its implementation.
        model_schema_hash: :func:`wearfleet_protos.tensors.schema_hash` of the model it works on.
        contract: the windows it expects.
        tensors: every state tensor.
        phases: run in order.
        upload: what goes back.
        keep_local: roles that the device persists and never sends.
        budget: limits.
        seed: of shuffling and random numbers; the device adds its round.
        downlink: codec of what goes down as a difference to what the device holds, float32 for exact differences; None
            for whole tensors.
    """

    plan_id: str
    strategy: str
    strategy_version: int
    model_schema_hash: Digest
    contract: InputContract
    tensors: tuple[TensorSpec, ...]
    phases: tuple[Phase, ...]
    upload: UploadSpec
    keep_local: tuple[TensorRole, ...]
    budget: Budget
    seed: int
    downlink: UpdateCodec | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def to_bytes(self) -> bytes:
        """Canonical JSON bytes; equal plans give equal bytes."""
        return canonical_json(_to_json(self))

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """Parse and check canonical bytes.

        Raises:
            ProtocolError: not a well-formed, consistent plan.
        """
        try:
            return _plan_from_json(parse_json(data, "plan"))
        except ProtocolError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, WearfleetError) as error:
            raise ProtocolError(f"plan has a field of the wrong type or range: {error}") from error

    def upload_specs(self) -> tuple[TensorSpec, ...]:
        """Specifications of the tensors that an update holds, in name order."""
        chosen = (t for t in self.tensors if t.role in self.upload.roles and t.group in self.upload.groups)
        return tuple(sorted(chosen, key=lambda t: t.name))

    def protects_windows(self) -> bool:
        """Whether what it learns from single windows is noised: then no figure of them may be sent beside."""
        return any(phase.loop.sampling_rate for phase in self.phases)

    def noised(self) -> bool:
        """Whether an update has noise that the device draws."""
        return self.protects_windows() or self.upload.noise > 0.0

    def update_format(self) -> UpdateFormat:
        """How an update becomes bytes, and back."""
        return UpdateFormat(self.upload_specs(), self.upload.codec, self.seed)

    def download_format(self) -> DownloadFormat:
        """How a difference to what a device holds becomes bytes, and back."""
        return DownloadFormat(self.download_specs(), self.downlink, self.seed)

    def download_specs(self) -> tuple[TensorSpec, ...]:
        """Specifications of the tensors that the server sends, in name order: the model's, and global ones beside."""
        chosen = (t for t in self.tensors if t.origin in ("global", "local") and not t.copy_of)
        return tuple(sorted(chosen, key=lambda t: t.name))

    def local_specs(self) -> tuple[TensorSpec, ...]:
        """Specifications of the tensors that stay on the device between rounds, in name order."""
        return tuple(sorted((t for t in self.tensors if t.origin == "local"), key=lambda t: t.name))

    def personal_names(self) -> dict[str, str]:
        """Model tensor -> the state tensor that makes a model personal: the device's own version of it, or itself.

        An own version is a tensor of group AUX that begins as a copy of the model's.
        """
        own = {t.copy_of: t.name for t in self.tensors if t.group == TensorGroup.AUX and t.copy_of}
        return {t.name: own.get(t.name, t.name) for t in self.tensors if t.group in _MODEL_GROUPS}


def _validate(plan: Plan) -> None:
    if not plan.phases or len(plan.phases) > _MAX_PHASES:
        raise ProtocolError(f"plan must have 1 to {_MAX_PHASES} phases, got {len(plan.phases)}")
    names = [t.name for t in plan.tensors]
    known = set(names)
    if len(known) != len(names) or len(names) > _MAX_TENSORS:
        raise ProtocolError(f"plan must have at most {_MAX_TENSORS} tensors with different names")
    for tensor in plan.tensors:
        _validate_tensor(plan, tensor, known)
    if plan.upload.form != "delta" and plan.upload.codec != FLOAT32:
        raise ProtocolError(f"codec {plan.upload.codec.name} is for differences, the plan uploads values")
    overlap = set(plan.upload.roles) & set(plan.keep_local)
    if overlap:
        raise ProtocolError(f"roles {sorted(overlap)} are both uploaded and kept local")
    sent = sorted(set(plan.upload_specs()) & set(plan.local_specs()), key=lambda spec: spec.name)
    if sent:
        raise ProtocolError(f"tensor {sent[0].name} is both uploaded and kept local")
    _validate_protection(plan)
    numbers = sum(math.prod(t.shape) for t in plan.tensors)
    for phase in plan.phases:
        _validate_phase(phase, known)
        _validate_sampling(phase, numbers)
        switch = next((t for t in plan.tensors if t.name == phase.when), None)
        if phase.when and (switch is None or (switch.dtype, switch.shape) != ("float32", ())):
            raise ProtocolError(f"phase {phase.name}: when needs a float32 number, {phase.when!r} is none")
    budget = plan.budget
    if not (budget.seconds > 0 and budget.max_bytes > 0 and budget.min_examples >= 1):
        raise ProtocolError(f"budget must be positive, got {budget}")


def _validate_protection(plan: Plan) -> None:
    upload = plan.upload
    if (
        not 0.0 <= upload.clip < np.inf
        or not 0.0 <= upload.noise < np.inf
        or (upload.noise and not upload.clip)
    ):
        raise ProtocolError(
            f"clip and noise must be at least 0, noise with a clip; got {upload.clip}, {upload.noise}"
        )
    if not upload.clip:
        return
    bare = [t.name for t in plan.upload_specs() if t.role in (TensorRole.NORM_STAT, TensorRole.COUNTER)]
    if upload.form != "delta" or bare:
        raise ProtocolError(f"only differences of parameters can be clipped, got {bare[:1] or upload.form}")


def _validate_tensor(plan: Plan, tensor: TensorSpec, known: set[str]) -> None:
    if tensor.copy_of and tensor.copy_of not in known:
        raise ProtocolError(f"tensor {tensor.name} copies unknown tensor {tensor.copy_of!r}")
    stays = tensor.origin == "local"
    if tensor.group in _MODEL_GROUPS:
        fits = stays == (tensor.role in plan.keep_local) and not tensor.copy_of
    else:
        fits = not stays or bool(tensor.copy_of)
    if not fits:
        raise ProtocolError(f"tensor {tensor.name}: origin {tensor.origin!r} contradicts keep_local")


def _validate_phase(phase: Phase, tensors: set[str]) -> None:
    scalars = {name for name, _ in phase.scalars}
    sources: dict[str, set[str]] = {"state": tensors, "batch": set(BATCH_INPUTS), "scalar": scalars}
    for binding in phase.inputs:
        if binding.source not in sources.get(binding.kind, set()):
            raise ProtocolError(
                f"phase {phase.name}: input {binding.input} has no {binding.kind} {binding.source!r}"
            )
    for output in phase.outputs:
        if output.kind not in ("state", "metric") or output.reduce not in ("sum", "last"):
            raise ProtocolError(f"phase {phase.name}: output {output.output} has an unknown kind")
        if output.kind == "state" and output.target not in tensors:
            raise ProtocolError(
                f"phase {phase.name}: output {output.output} writes unknown tensor {output.target!r}"
            )
    loop = phase.loop
    if loop.split not in get_args(Split) or loop.batch_size < 1 or loop.epochs < 1 or loop.max_steps < 0:
        raise ProtocolError(f"phase {phase.name}: loop is out of range: {loop}")


def _validate_sampling(phase: Phase, numbers: int) -> None:
    """Secret batches have no passes, a number of steps that is fixed beforehand, and noise."""
    loop, bound = phase.loop, {b.source for b in phase.inputs if b.kind == "batch"}
    secret = 0.0 < loop.sampling_rate <= 1.0
    if not secret and (loop.sampling_rate or phase.noise or bound & {"noise", "expected"}):
        raise ProtocolError(
            f"phase {phase.name}: noise belongs to batches with a sampling rate above 0 and at most 1, "
            f"got {loop.sampling_rate}"
        )
    if secret and not (loop.max_steps >= 1 and loop.epochs == 1 and not loop.shuffle):
        raise ProtocolError(
            f"phase {phase.name}: secret batches need max_steps and have no passes, got {loop}"
        )
    if secret and not 1 <= phase.noise <= numbers:
        raise ProtocolError(f"phase {phase.name}: noise must be 1 to {numbers} numbers, got {phase.noise}")


def _to_json(plan: Plan) -> dict[str, object]:
    return {
        "plan_id": plan.plan_id,
        "strategy": plan.strategy,
        "strategy_version": plan.strategy_version,
        "model_schema_hash": plan.model_schema_hash,
        "contract": contract_to_json(plan.contract),
        "tensors": [t.to_json() for t in plan.tensors],
        "phases": [_phase_to_json(p) for p in plan.phases],
        "upload": {
            "roles": [str(r) for r in plan.upload.roles],
            "groups": [str(g) for g in plan.upload.groups],
            "form": plan.upload.form,
            "codec": plan.upload.codec.to_json(),
            **({"clip": plan.upload.clip, "noise": plan.upload.noise} if plan.upload.clip else {}),
        },
        "keep_local": [str(r) for r in plan.keep_local],
        "budget": {
            "seconds": plan.budget.seconds,
            "max_bytes": plan.budget.max_bytes,
            "min_examples": plan.budget.min_examples,
        },
        "seed": plan.seed,
        **({"downlink": plan.downlink.to_json()} if plan.downlink else {}),
    }


def contract_to_json(contract: InputContract) -> dict[str, object]:
    """The JSON object of an input contract."""
    return {
        "channels": [[c.name, c.unit] for c in contract.channels],
        "rate_hz": contract.rate_hz,
        "window": contract.window,
        "stride": contract.stride,
        "labels": list(contract.labels),
    }


def contract_from_json(value: object) -> InputContract:
    """Parse :func:`contract_to_json`."""
    row = take(value, InputContract, "contract")
    return InputContract(
        channels=tuple(Channel(str(name), str(unit)) for name, unit in row["channels"]),
        rate_hz=float(row["rate_hz"]),
        window=int(row["window"]),
        stride=int(row["stride"]),
        labels=tuple(str(name) for name in row["labels"]),
    )


def _phase_to_json(phase: Phase) -> dict[str, object]:
    return {
        "name": phase.name,
        "graph": phase.graph,
        "graph_bytes": phase.graph_bytes,
        "inputs": [{"input": b.input, "kind": b.kind, "source": b.source} for b in phase.inputs],
        "outputs": [
            {"output": b.output, "kind": b.kind, "target": b.target, "reduce": b.reduce}
            for b in phase.outputs
        ],
        "loop": {
            "split": phase.loop.split,
            "batch_size": phase.loop.batch_size,
            "epochs": phase.loop.epochs,
            "max_steps": phase.loop.max_steps,
            "shuffle": phase.loop.shuffle,
            **({"sampling_rate": phase.loop.sampling_rate} if phase.loop.sampling_rate else {}),
        },
        "scalars": [[name, value] for name, value in phase.scalars],
        **({"when": phase.when} if phase.when else {}),
        **({"noise": phase.noise} if phase.noise else {}),
    }


def tensor_spec_from_json(value: object) -> TensorSpec:
    """Parse :meth:`TensorSpec.to_json`."""
    row = take(value, TensorSpec, "tensor")
    return TensorSpec(
        name=str(row["name"]),
        dtype=str(row["dtype"]),
        shape=tuple(int(size) for size in row["shape"]),
        role=TensorRole(row["role"]),
        group=TensorGroup(row["group"]),
        origin=cast("Origin", row["origin"]),
        copy_of=str(row["copy_of"]),
    )


def _phase_from_json(value: object) -> Phase:
    given = value if isinstance(value, dict) else {}
    row = take({"when": "", "noise": 0, **given}, Phase, "phase")
    loop = take({"sampling_rate": 0.0, **row["loop"]}, Loop, "loop")
    return Phase(
        name=str(row["name"]),
        graph=parse_digest(str(row["graph"])),
        graph_bytes=int(row["graph_bytes"]),
        inputs=tuple(InputBinding(**take(b, InputBinding, "input")) for b in row["inputs"]),
        outputs=tuple(OutputBinding(**take(b, OutputBinding, "output")) for b in row["outputs"]),
        loop=Loop(
            split=loop["split"],
            batch_size=int(loop["batch_size"]),
            epochs=int(loop["epochs"]),
            max_steps=int(loop["max_steps"]),
            shuffle=bool(loop["shuffle"]),
            sampling_rate=float(loop["sampling_rate"]),
        ),
        scalars=tuple((str(name), float(number)) for name, number in row["scalars"]),
        when=str(row["when"]),
        noise=int(row["noise"]),
    )


def _plan_from_json(value: Mapping[str, Any]) -> Plan:
    row = take({"downlink": None, **value}, Plan, "plan")
    upload = take({"clip": 0.0, "noise": 0.0, **row["upload"]}, UploadSpec, "upload")
    if upload["form"] not in ("delta", "value"):
        raise ProtocolError(f"upload form is unknown: {upload['form']!r}")
    budget = take(row["budget"], Budget, "budget")
    return Plan(
        plan_id=str(row["plan_id"]),
        strategy=str(row["strategy"]),
        strategy_version=int(row["strategy_version"]),
        model_schema_hash=parse_digest(str(row["model_schema_hash"])),
        contract=contract_from_json(row["contract"]),
        tensors=tuple(tensor_spec_from_json(t) for t in row["tensors"]),
        phases=tuple(_phase_from_json(p) for p in row["phases"]),
        upload=UploadSpec(
            roles=tuple(TensorRole(r) for r in upload["roles"]),
            groups=tuple(TensorGroup(g) for g in upload["groups"]),
            form=upload["form"],
            codec=UpdateCodec.from_json(upload["codec"]),
            clip=float(upload["clip"]),
            noise=float(upload["noise"]),
        ),
        keep_local=tuple(TensorRole(r) for r in row["keep_local"]),
        budget=Budget(float(budget["seconds"]), int(budget["max_bytes"]), int(budget["min_examples"])),
        seed=int(row["seed"]),
        downlink=None if row["downlink"] is None else UpdateCodec.from_json(row["downlink"]),
    )
