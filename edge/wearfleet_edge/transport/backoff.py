"""How long to wait before the next try: exponential with full jitter, so that a fleet does not return at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from wearfleet_protos.errors import TransportError

__all__ = ["Backoff", "with_retries"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays before each try.

    Args:
        first_s: upper limit of the first delay.
        cap_s: upper limit of any delay.
        uniform: random number in [0, 1).

    Source:
        Brooker 2015, "Exponential backoff and jitter": full jitter.
    """

    first_s: float
    cap_s: float
    uniform: Callable[[], float]

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row, at least 1."""
        return self.uniform() * min(self.cap_s, self.first_s * 2.0 ** min(failures - 1, 60))


def with_retries(
    call: Callable[[], T], *, attempts: int, backoff: Backoff, wait: Callable[[float], bool]
) -> T:
    """Call until it succeeds, fails for good, or has failed ``attempts`` times.

    Args:
        call: may raise :class:`TransportError`.
        attempts: most calls, at least 1.
        backoff: delays between them.
        wait: waits the given seconds and tells whether to give up.

    Raises:
        TransportError: the last failure.
    """
    failures = 0
    while True:
        try:
            return call()
        except TransportError as error:
            failures += 1
            if not error.retryable or failures == attempts or wait(backoff.delay(failures)):
                raise
