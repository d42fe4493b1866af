"""A codec of updates as a plan declares it: a name with its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, cast

from wearfleet_protos.errors import ProtocolError

__all__ = ["FLOAT32", "PARAMETERS", "UpdateCodec"]

PARAMETERS: Final[dict[str, tuple[str, ...]]] = {
    "float32": (),
    "fp16": (),
    "bf16": (),
    "int8": (),
    "int4": (),
    "topk": ("fraction", "warmup_rounds"),
    "randk": ("fraction",),
    "sign": (),
    "powersgd": ("rank",),
}
"""Every codec, and which fields of :class:`UpdateCodec` it has."""

_FIRST_FRACTION: Final = 0.25
_MOST_RANK: Final = 1024
_MOST_WARMUP: Final = 10_000


@dataclass(frozen=True, slots=True)
class UpdateCodec:
    """How the tensors of an update become bytes.

    Args:
        name: a key of :data:`PARAMETERS`.
        fraction: share of the numbers that ``topk`` and ``randk`` send, above 0, at most 1; 0 for the others.
        rank: of ``powersgd``, at least 1; 0 for the others.
        warmup_rounds: ``topk`` begins with a quarter of the numbers and reaches ``fraction`` after so many rounds.

    Raises:
        ProtocolError: an unknown name, a parameter that this codec does not have, or one out of range.
    """

    name: str
    fraction: float = 0.0
    rank: int = 0
    warmup_rounds: int = 0

    def __post_init__(self) -> None:
        if self.name not in PARAMETERS:
            raise ProtocolError(
                f"unknown codec of updates {self.name!r}; this version knows {', '.join(PARAMETERS)}: update it, "
                "or choose one of them"
            )
        own = PARAMETERS[self.name]
        for field in ("fraction", "rank", "warmup_rounds"):
            if field not in own and getattr(self, field):
                raise ProtocolError(f"codec {self.name} has no {field} (got {getattr(self, field)})")
        if "fraction" in own and not 0.0 < self.fraction <= 1.0:
            raise ProtocolError(
                f"fraction of codec {self.name} must be above 0, at most 1, got {self.fraction}"
            )
        if "rank" in own and not 1 <= self.rank <= _MOST_RANK:
            raise ProtocolError(f"rank of codec {self.name} must be 1 to {_MOST_RANK}, got {self.rank}")
        if not 0 <= self.warmup_rounds <= _MOST_WARMUP:
            raise ProtocolError(f"warmup_rounds must be 0 to {_MOST_WARMUP}, got {self.warmup_rounds}")

    def count(self, total: int, round_number: int) -> int:
        """How many of ``total`` numbers are sent in a round (from 1); geometric from 1/4 in the warm-up."""
        share = self.fraction
        if round_number <= self.warmup_rounds and share < _FIRST_FRACTION:
            share = _FIRST_FRACTION * (share / _FIRST_FRACTION) ** ((round_number - 1) / self.warmup_rounds)
        return min(total, math.ceil(share * total))

    def to_json(self) -> str | dict[str, object]:
        """The value of a canonical document: the name, or the name with its parameters where it has some."""
        own = PARAMETERS[self.name]
        return {"name": self.name, **{field: getattr(self, field) for field in own}} if own else self.name

    @staticmethod
    def from_json(value: object) -> UpdateCodec:
        """Parse :meth:`to_json`.

        Raises:
            ProtocolError: not a codec that this version knows.
        """
        if isinstance(value, str):
            return UpdateCodec(value)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ProtocolError(f"a codec must be a name, or an object with a name, got {str(value)[:80]!r}")
        row = cast("dict[str, Any]", value)
        wanted = PARAMETERS.get(row["name"])
        if wanted is not None and row.keys() - {"name"} != set(wanted):
            raise ProtocolError(f"codec {row['name']} must have exactly {list(wanted)}, got {sorted(row)}")
        return UpdateCodec(
            row["name"],
            float(row.get("fraction", 0.0)),
            int(row.get("rank", 0)),
            int(row.get("warmup_rounds", 0)),
        )


FLOAT32: Final = UpdateCodec("float32")
"""Everything as it is, as safetensors."""
