"""An update as bytes and back: the same code on the device and in the service.

The bytes are ``wfu1``, the round (uint32), the tensors that are not coded as they are, then the coded ones, both in the
order of their names. Shapes are those of the plan and not in the bytes, so what they unfold to is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.codecs.casts import Bf16, Fp16
from wearfleet_protos.codecs.declaration import FLOAT32, UpdateCodec
from wearfleet_protos.codecs.family import Reader, Turn
from wearfleet_protos.codecs.linear import Int4, Int8
from wearfleet_protos.codecs.low_rank import PowerSgd
from wearfleet_protos.codecs.residual import Residual, purpose_of
from wearfleet_protos.codecs.sign import Sign
from wearfleet_protos.codecs.sparse import RandK, TopK
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.tensors import (
    TensorRole,
    TensorSpec,
    check_finite,
    check_tensors,
    decode_tensors,
    encode_tensors,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.family import Arrays, EachNumber, Family, Shapes

__all__ = ["FEEDBACK", "Encoded", "UpdateFormat", "is_coded"]

Tensors = Mapping[str, "NDArray[np.generic]"]

FEEDBACK: Final = frozenset({"int4", "topk", "randk", "sign", "powersgd"})
"""Codecs whose loss is kept and added to the next update."""

_MAGIC: Final = b"wfu1"
_HEAD_BYTES: Final = len(_MAGIC) + 4
_FEWEST_BYTES: Final = 1024
_EXEMPT: Final = (TensorRole.NORM_STAT, TensorRole.COUNTER, TensorRole.AUX)
_EACH: Final[Mapping[str, EachNumber]] = {
    "fp16": Fp16(),
    "bf16": Bf16(),
    "int8": Int8(),
    "int4": Int4(),
    "sign": Sign(),
}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """The bytes of an update, and what the device owes once they count."""

    data: bytes
    residual: Residual


def is_coded(spec: TensorSpec) -> bool:
    """False for what is sent as it is: tensors below 1 kB, statistics, counters, and a strategy's own tensors."""
    return spec.dtype == "float32" and spec.role not in _EXEMPT and spec.size_bytes >= _FEWEST_BYTES


@dataclass(frozen=True, slots=True)
class UpdateFormat:
    """The bytes of the updates of a run.

    Args:
        specs: ``Plan.upload_specs()``.
        codec: ``Plan.upload.codec``.
        seed: of the plan.
    """

    specs: tuple[TensorSpec, ...]
    codec: UpdateCodec
    seed: int

    def encode(self, update: Tensors, residual: Residual, *, round_number: int, client: str) -> Encoded:
        """Bytes of an update.

        Args:
            update: tensors of ``specs``, finite.
            residual: what the last update that counted left behind.
            round_number: of the task, from 1.
            client: what no other client of the round has, for example the attempt's id.

        Raises:
            ShapeError: the update does not fit ``specs``, or with what is owed it is not finite.
        """
        check_tensors(update, self.specs)
        if self.codec == FLOAT32:
            return Encoded(encode_tensors(update), Residual())
        plain, shapes = _divided(self.specs)
        purpose = purpose_of(self.codec, shapes)
        owed, memory = residual.at(round_number, purpose)
        wanted = {name: _sum(update[name], owed.get(name)) for name in shapes}
        check_finite(wanted)
        turn = Turn(self.seed, round_number)
        family = self._family(turn)
        coded, memory = family.encode(wanted, memory, turn.draws(client)) if shapes else (b"", {})
        head = _MAGIC + round_number.to_bytes(4, "little")
        data = b"".join((head, *(_raw(update[spec.name], spec) for spec in plain), coded))
        if self.codec.name not in FEEDBACK or not shapes:
            return Encoded(data, Residual())
        sent = family.decode(Reader(coded), shapes)
        lost = {name: wanted[name] - sent[name] for name in shapes}
        return Encoded(data, Residual(lost, memory, purpose, round_number))

    def decode(self, data: bytes | bytearray | memoryview) -> dict[str, NDArray[np.generic]]:
        """The tensors of an update.

        Raises:
            IntegrityError: the bytes are not an update of these tensors in this codec.
            ShapeError: a tensor is missing, unexpected, of another shape or type, or not finite.
        """
        if self.codec == FLOAT32:
            tensors = decode_tensors(data, self.specs)
            check_finite(tensors)
            return tensors
        reader = Reader(data)
        if reader.take("uint8", len(_MAGIC)).tobytes() != _MAGIC:
            raise IntegrityError(
                f"not an update in codec {self.codec.name}: it begins with {bytes(data[:4])!r}"
            )
        round_number = int(reader.take("uint32", 1)[0])
        if len(data) > (most := self.most_bytes(round_number)):
            raise IntegrityError(f"encoded update has {len(data)} bytes, at most {most} are accepted")
        plain, shapes = _divided(self.specs)
        tensors = {spec.name: _plain(reader, spec) for spec in plain}
        if shapes:
            tensors |= self._family(Turn(self.seed, round_number)).decode(reader, shapes)
        reader.end()
        check_finite(tensors)
        return tensors

    def most_bytes(self, round_number: int) -> int:
        """Largest update of a round, in bytes; for float32 without the header of the file."""
        if self.codec == FLOAT32:
            return self.unfolded_bytes
        plain, shapes = _divided(self.specs)
        coded = self._family(Turn(self.seed, round_number)).most_bytes(shapes) if shapes else 0
        return _HEAD_BYTES + sum(spec.size_bytes for spec in plain) + coded

    @property
    def unfolded_bytes(self) -> int:
        """Memory that the tensors of an update take."""
        return sum(spec.size_bytes for spec in self.specs)

    def _family(self, turn: Turn) -> Family:
        if self.codec.name == "topk":
            return TopK(self.codec, turn)
        if self.codec.name == "randk":
            return RandK(self.codec, turn)
        if self.codec.name == "powersgd":
            return PowerSgd(self.codec.rank)
        return _Rows(_EACH[self.codec.name])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tensor by tensor; implements ``Family``."""

    each: EachNumber

    def encode(
        self,
        tensors: Arrays,
        memory: Arrays,  # noqa: ARG002
        draws: np.random.Generator,
    ) -> tuple[bytes, dict[str, NDArray[np.float32]]]:
        return b"".join(self.each.encode(values.reshape(-1), draws) for values in tensors.values()), {}

    def most_bytes(self, shapes: Shapes) -> int:
        return sum(self.each.size_bytes(math.prod(shape)) for shape in shapes.values())

    def decode(self, reader: Reader, shapes: Shapes) -> dict[str, NDArray[np.float32]]:
        return {n: self.each.decode(reader, math.prod(s)).reshape(s) for n, s in shapes.items()}


def _divided(specs: Sequence[TensorSpec]) -> tuple[list[TensorSpec], dict[str, tuple[int, ...]]]:
    """What is sent as it is, and the shapes of what is coded; both in the order of names."""
    ordered = sorted(specs, key=lambda spec: spec.name)
    return [s for s in ordered if not is_coded(s)], {s.name: s.shape for s in ordered if is_coded(s)}


def _sum(update: NDArray[np.generic], owed: NDArray[np.float32] | None) -> NDArray[np.float32]:
    values = np.ascontiguousarray(update, np.float32)
    if owed is None:
        return values
    with np.errstate(over="ignore"):
        return values + owed


def _raw(values: NDArray[np.generic], spec: TensorSpec) -> bytes:
    return values.astype(np.dtype(spec.dtype).newbyteorder("<")).tobytes()


def _plain(reader: Reader, spec: TensorSpec) -> NDArray[np.generic]:
    count = math.prod(spec.shape)
    if spec.dtype != "bool":
        return reader.take(spec.dtype, count).reshape(spec.shape)
    values = reader.take("uint8", count)
    if bool((values > 1).any()):
        raise IntegrityError(f"tensor {spec.name}: a truth value must be 0 or 1")
    return values.astype(np.bool_).reshape(spec.shape)
