"""What a robust aggregation says of each client, for the record of the round and for operators."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from wearfleet_protos.errors import ProtocolError

__all__ = ["OUTLYING", "Judgement", "Verdict"]

Verdict = Literal["counted", "clipped", "left out", "refused"]

OUTLYING: Final = 3.0
"""An update that lies so many times farther from the aggregate than the median one is named as outlying. Of a normal
spread in one dimension 4 % lie so far; in the thousands of dimensions of a model hardly any."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One client's part of an aggregation.

    Args:
        client: identity.
        verdict: ``counted`` as it was, ``clipped`` to a length, ``left out`` by the rule, or ``refused`` before it.
        reason: of a verdict other than ``counted``, in words; of an outlying update too.
        norm: Euclidean norm of its trained tensors; 0 when it could not be measured.
        distance: from the aggregate; 0 for a refused one.
        score: of the rule: of Krum the sum of squared distances, of clipping the factor; 0 when it has none.
        suspect: refused, or farther from the aggregate than ``OUTLYING`` times the median. Being left out is none:
            rules leave honest clients out in every round.
    """

    client: str
    verdict: Verdict
    reason: str = ""
    norm: float = 0.0
    distance: float = 0.0
    score: float = 0.0
    suspect: bool = False

    @property
    def noted(self) -> bool:
        """Worth a place in the round's record."""
        return self.suspect or self.verdict != "counted"

    def to_dict(self) -> dict[str, object]:
        """Values that JSON can hold; inverse of :meth:`from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "Judgement":
        """A judgement as it was stored.

        Raises:
            ProtocolError: not a stored judgement.
        """
        try:
            return Judgement(**stored)
        except TypeError as error:
            raise ProtocolError(f"stored judgement of a client cannot be read: {error}") from error
