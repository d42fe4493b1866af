"""What a device owes: the part of its updates that a codec lost, kept from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import IntegrityError
from wearfleet_protos.tensors import check_finite, decode_tensors, digest_of, encode_tensors, tensor_metadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wearfleet_protos.codecs.declaration import UpdateCodec
    from wearfleet_protos.codecs.family import Arrays, Shapes

__all__ = ["Residual", "purpose_of"]

_OWED: Final = "owed/"
_MEMORY: Final = "memory/"
_MOST_MISSED: Final = 20
_DECAY: Final = 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """What an update left behind; an empty one before the first.

    Args:
        owed: float32 by tensor: what to add to the next update.
        memory: float32 by tensor: what helps the codec the next time.
        purpose: :func:`purpose_of` what it was made with.
        round_number: in which it was left.
    """

    owed: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    memory: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    purpose: str = ""
    round_number: int = 0

    def at(self, round_number: int, purpose: str) -> tuple[Arrays, Arrays]:
        """What is owed, and the memory, in a later round.

        Each missed round takes a tenth off what is owed; more than 20, or another purpose, and nothing is left.

        Source: specs/federated.md section 19.
        """
        missed = max(0, round_number - self.round_number - 1)
        if purpose != self.purpose or missed > _MOST_MISSED:
            return {}, {}
        if not missed:
            return self.owed, self.memory
        kept = np.float32(_DECAY**missed)
        return {name: values * kept for name, values in self.owed.items()}, self.memory

    def to_bytes(self) -> bytes:
        """For the disk; b"" when there is nothing to keep."""
        if not self.purpose:
            return b""
        tensors = {_OWED + name: values for name, values in self.owed.items()}
        tensors |= {_MEMORY + name: values for name, values in self.memory.items()}
        return encode_tensors(tensors, {"purpose": self.purpose, "round": str(self.round_number)})

    @staticmethod
    def from_bytes(data: bytes) -> Residual:
        """Inverse of :meth:`to_bytes`.

        Raises:
            IntegrityError: the bytes are damaged.
            ShapeError: they hold values that are not finite.
        """
        if not data:
            return Residual()
        tensors, about = decode_tensors(data), tensor_metadata(data)
        check_finite(tensors)
        parts: dict[str, dict[str, NDArray[np.float32]]] = {_OWED: {}, _MEMORY: {}}
        for name, values in tensors.items():
            prefix = next((p for p in parts if name.startswith(p)), "")
            if not prefix or values.dtype != np.float32:
                raise IntegrityError(f"residual holds {name!r} of type {values.dtype}; it is damaged")
            parts[prefix][name.removeprefix(prefix)] = values.astype(np.float32)
        if not about.get("purpose") or not about.get("round", "").isdecimal():
            raise IntegrityError("residual does not say what it was made for; it is damaged")
        return Residual(parts[_OWED], parts[_MEMORY], about["purpose"], int(about["round"]))


def purpose_of(codec: UpdateCodec, shapes: Shapes) -> str:
    """Digest of a codec and the tensors that it codes; a residual fits no other."""
    return digest_of(canonical_json([codec.to_json(), [[name, list(shapes[name])] for name in shapes]]))
