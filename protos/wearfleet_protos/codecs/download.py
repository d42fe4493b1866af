"""What a device downloads as the difference to what it holds: the same code in the service and on the device.

A difference is ``wfd1``, the number of its steps (uint8), and each step with its length (uint32) before it. A step is a
bit for each tensor in the order of names, 1 where it changes; the length of its coded part (uint32), that part, and to
its end the exact part. Coded are the changes of large tensors, in the codec of the plan, to be added. The exact part is
zlib of all other tensors that change: differences of their bits taken as integers, the small ones near 0 and the bytes
of equal weight together. Shapes are those of the plan, so what a step unfolds to is known before it is read. A tensor
that is not held counts as zeros.

What a codec loses in one step is in the next one, because that begins at what the first one gave. Both ends must get
the same bits, so whoever applies a difference compares the digest of what it made with the promised one.

Source: specs/federated.md sections 19 (down-link) and 23 (R16).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from wearfleet_protos.codecs.declaration import FLOAT32, UpdateCodec
from wearfleet_protos.codecs.family import Reader
from wearfleet_protos.codecs.residual import Residual
from wearfleet_protos.codecs.update import UpdateFormat, is_coded
from wearfleet_protos.errors import IntegrityError, ShapeError
from wearfleet_protos.tensors import TensorRole, TensorSpec, check_finite, encode_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MOST_STEPS", "DownloadFormat", "frozen_bytes"]

Tensors = Mapping[str, "NDArray[np.generic]"]

MOST_STEPS: Final = 8
"""Versions that the service goes back, and most steps of a difference."""

_MAGIC: Final = b"wfd1"
_FEWEST_FROZEN: Final = 1024
_LEVEL: Final = 6
_ALL: Final = "all clients"


def frozen_bytes(specs: Sequence[TensorSpec], tensors: Tensors) -> bytes:
    """Safetensors bytes of the FROZEN tensors, whose digest a device tells when it holds them.

    b"" when they have less than 1 kB together: to tell of them would cost as much as to send them.
    """
    frozen = [spec for spec in specs if spec.role == TensorRole.FROZEN]
    if sum(spec.size_bytes for spec in frozen) < _FEWEST_FROZEN:
        return b""
    return encode_tensors({spec.name: tensors[spec.name] for spec in frozen})


@dataclass(frozen=True, slots=True)
class DownloadFormat:
    """The differences of a run.

    Args:
        specs: ``Plan.download_specs()``.
        codec: of steps; float32 for exact ones. None, where whole tensors are sent, is as float32.
        seed: of the plan.
    """

    specs: tuple[TensorSpec, ...]
    codec: UpdateCodec | None
    seed: int

    def step(
        self, old: Tensors, new: Tensors, round_number: int
    ) -> tuple[bytes, dict[str, NDArray[np.generic]]]:
        """A step in the codec, and the tensors that it leads to.

        Args:
            old: all tensors, as the devices have them.
            new: all tensors, as they should be.
            round_number: whose step it is, from 1.

        Raises:
            ShapeError: a change is not finite.
        """
        changed = self._changed(old, new)
        chosen = [spec for spec in changed if self._codes(spec)]
        coded, shown = b"", {spec.name: new[spec.name] for spec in self.specs}
        if chosen:
            with np.errstate(over="ignore"):
                moved = {s.name: np.subtract(new[s.name], old[s.name]) for s in chosen}
            coder = self._coder(chosen)
            coded = coder.encode(moved, Residual(), round_number=round_number, client=_ALL).data
            shown |= _added(old, coder.decode(coded))
        exact = [spec for spec in changed if spec not in chosen]
        return self._assembled(changed, coded, _folded(exact, old, new)), shown

    def exact(self, held: Tensors, new: Tensors) -> bytes:
        """A step that leads to ``new`` to the bit, from all or some tensors."""
        old = self._start(held)
        changed = self._changed(old, new)
        return self._assembled(changed, b"", _folded(changed, old, new))

    def join(self, steps: Sequence[bytes]) -> bytes:
        """The difference that is made of some steps, at most :data:`MOST_STEPS`."""
        assert len(steps) <= MOST_STEPS
        parts = [len(step).to_bytes(4, "little") + step for step in steps]
        return b"".join((_MAGIC, len(steps).to_bytes(1, "little"), *parts))

    def apply(self, held: Tensors, data: bytes | bytearray | memoryview) -> dict[str, NDArray[np.generic]]:
        """All tensors, from those that are held and a difference to them.

        Raises:
            IntegrityError: not a difference of these tensors in this codec.
            ShapeError: a held tensor has another shape or type, or a change is not finite.
        """
        tensors = self._start(held)
        reader = Reader(data)
        if reader.take("uint8", len(_MAGIC)).tobytes() != _MAGIC:
            raise IntegrityError(f"not a difference of tensors: it begins with {bytes(data[:4])!r}")
        if (count := int(reader.take("uint8", 1)[0])) > MOST_STEPS:
            raise IntegrityError(f"a difference has at most {MOST_STEPS} steps, got {count}")
        for _ in range(count):
            size = int(reader.take("uint32", 1)[0])
            tensors |= self._after(tensors, Reader(reader.take("uint8", size).data))
        reader.end()
        return tensors

    def _codes(self, spec: TensorSpec) -> bool:
        return self.codec not in (None, FLOAT32) and is_coded(spec)

    def _coder(self, chosen: Sequence[TensorSpec]) -> UpdateFormat:
        assert self.codec is not None
        return UpdateFormat(tuple(chosen), self.codec, self.seed)

    def _start(self, held: Tensors) -> dict[str, NDArray[np.generic]]:
        start: dict[str, NDArray[np.generic]] = {}
        for spec in self.specs:
            array = held.get(spec.name)
            start[spec.name] = np.zeros(spec.shape, spec.dtype) if array is None else array
            if start[spec.name].shape != spec.shape or start[spec.name].dtype != np.dtype(spec.dtype):
                raise ShapeError(
                    f"held tensor {spec.name}: expected {spec.dtype} {spec.shape}, got {start[spec.name].dtype} "
                    f"{start[spec.name].shape}"
                )
        return start

    def _changed(self, old: Tensors, new: Tensors) -> list[TensorSpec]:
        """Specifications of tensors that differ in a bit."""
        return [s for s in self.specs if not np.array_equal(_words(old[s.name]), _words(new[s.name]))]

    def _assembled(self, changed: Sequence[TensorSpec], coded: bytes, exact: bytes) -> bytes:
        flags = np.array([spec in changed for spec in self.specs], np.bool_)
        bits = np.packbits(flags, bitorder="little").tobytes()
        return b"".join((bits, len(coded).to_bytes(4, "little"), coded, exact))

    def _after(self, old: Tensors, reader: Reader) -> dict[str, NDArray[np.generic]]:
        """The tensors that a step changes."""
        bits = reader.take("uint8", (len(self.specs) + 7) // 8)
        flags = np.unpackbits(bits, count=len(self.specs), bitorder="little")
        changed = [spec for spec, flag in zip(self.specs, flags, strict=True) if flag]
        coded = reader.take("uint8", int(reader.take("uint32", 1)[0])).tobytes()
        chosen = [spec for spec in changed if coded and self._codes(spec)]
        if coded and not chosen:
            raise IntegrityError(
                "a difference has a coded part, but nothing that this plan codes has changed"
            )
        exact = [spec for spec in changed if spec not in chosen]
        after: dict[str, NDArray[np.generic]] = dict(_unfolded(exact, old, reader.rest().tobytes()))
        return after | (_added(old, self._coder(chosen).decode(coded)) if chosen else {})


def _added(old: Tensors, moved: Tensors) -> dict[str, NDArray[np.generic]]:
    with np.errstate(over="ignore"):
        shown = {name: np.asarray(np.add(old[name], change)) for name, change in moved.items()}
    check_finite(shown)
    return shown


def _words(array: NDArray[np.generic]) -> NDArray[Any]:
    """(n,) the bits of an array as unsigned integers, little-endian."""
    kind = array.dtype.newbyteorder("<")
    flat = np.ascontiguousarray(array, kind).reshape(-1)
    return flat.view(f"<u{kind.itemsize}")


def _by_size(specs: Sequence[TensorSpec]) -> dict[int, list[TensorSpec]]:
    groups: dict[int, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(np.dtype(spec.dtype).itemsize, []).append(spec)
    return dict(sorted(groups.items()))


def _folded(specs: Sequence[TensorSpec], old: Tensors, new: Tensors) -> bytes:
    """The exact part: of differences d of bits 2 d, or -2 d - 1 where d < 0; all first bytes before all second ones."""
    planes = []
    for size, group in _by_size(specs).items():
        moved = np.concatenate([_words(new[s.name]) - _words(old[s.name]) for s in group])
        one = moved.dtype.type(1)
        signs = np.zeros_like(moved) - (moved >> moved.dtype.type(8 * size - 1))
        folded = (moved << one) ^ signs
        planes.append(np.ascontiguousarray(folded.view(np.uint8).reshape(-1, size).T).tobytes())
    return zlib.compress(b"".join(planes), _LEVEL) if planes else b""


def _unfolded(specs: Sequence[TensorSpec], old: Tensors, data: bytes) -> dict[str, NDArray[np.generic]]:
    raw, at = _inflated(data, sum(spec.size_bytes for spec in specs)), 0
    tensors: dict[str, NDArray[np.generic]] = {}
    for size, group in _by_size(specs).items():
        total = sum(spec.size_bytes for spec in group)
        planes = np.frombuffer(raw, np.uint8, total, at).reshape(size, -1)
        folded = np.ascontiguousarray(planes.T).reshape(-1).view(f"<u{size}")
        one = folded.dtype.type(1)
        moved, at, begin = (folded >> one) ^ (np.zeros_like(folded) - (folded & one)), at + total, 0
        for spec in group:
            end = begin + spec.size_bytes // size
            words = _words(old[spec.name]) + moved[begin:end]
            if spec.dtype == "bool" and bool((words > 1).any()):
                raise IntegrityError(f"tensor {spec.name}: a truth value must be 0 or 1")
            kind = np.dtype(spec.dtype)
            tensors[spec.name] = words.view(kind.newbyteorder("<")).astype(kind).reshape(spec.shape)
            begin = end
    return tensors


def _inflated(data: bytes, size: int) -> bytes:
    if not size:
        if data:
            raise IntegrityError(f"a difference has {len(data)} bytes for tensors that do not change")
        return b""
    unpacker = zlib.decompressobj()
    try:
        raw = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise IntegrityError(f"a difference cannot be unpacked ({error})") from error
    if len(raw) != size or not unpacker.eof or unpacker.unused_data:
        raise IntegrityError(f"a difference does not unpack to the {size} bytes of the tensors that change")
    return raw
