"""A run on disk: one safetensors file that holds the tensors and, as its metadata, a JSON document.

One file, written beside the old one and then renamed over it, is either the old checkpoint or the new one after a
power cut at any moment.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from wearfleet_protos.errors import IntegrityError

from wearfleet_cloud.algorithms.base import State
from wearfleet_cloud.training.selection import Best, Scores

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint", "write_atomically"]

_PARTS = State._fields


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything a run needs to go on.

    Args:
        fingerprint: of settings and data; a run resumes only its own checkpoint.
        step: updates made.
        state: after them.
        best: kept step of every selection rule, for each of the runs that advance together.
        kept: named parameters and buffers of the networks of the kept steps.
        seconds: spent in updates so far.
    """

    fingerprint: str
    step: int
    state: State
    best: tuple[Mapping[str, Best], ...]
    kept: Mapping[str, Tensor]
    seconds: float


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a reader sees the old one or the new one, never a part."""
    tensors = {
        f"{part}:{name}": tensor
        for part, named in zip(_PARTS, checkpoint.state, strict=True)
        for name, tensor in named.items()
    }
    tensors |= {f"kept:{name}": tensor for name, tensor in checkpoint.kept.items()}
    document = {
        "fingerprint": checkpoint.fingerprint,
        "step": checkpoint.step,
        "best": [{rule: asdict(best) for rule, best in rules.items()} for rules in checkpoint.best],
        "seconds": checkpoint.seconds,
    }
    owned = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(owned, {"checkpoint": json.dumps(document)}))


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        IntegrityError: not a checkpoint of ours, or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            document = json.loads((file.metadata() or {})["checkpoint"])
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "kept")}
            for full_name in file.keys():  # noqa: SIM118 - not a mapping
                part, _, name = full_name.partition(":")
                parts[part][name] = file.get_tensor(full_name)
            return Checkpoint(
                fingerprint=str(document["fingerprint"]),
                step=int(document["step"]),
                state=State(*(parts[part] for part in _PARTS)),
                best=tuple(
                    {rule: Best(int(b["step"]), Scores(**b["scores"])) for rule, b in rules.items()}
                    for rules in document["best"]
                ),
                kept=parts["kept"],
                seconds=float(document["seconds"]),
            )
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise IntegrityError(
            f"{path} is not a readable checkpoint ({error}); delete it to start again"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content; after a crash it holds all of the old bytes or all of the new ones."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
