"""Shamir's secret sharing over a prime field.

A secret is the value at 0 of a random polynomial of degree t - 1; share x is its value at x. Any t of them determine
the polynomial, fewer say nothing about it.

Source: Shamir 1979, doi:10.1145/359168.359176.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final

from wearfleet_protos.errors import ProtocolError

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "join", "split"]

PRIME: Final = 2**256 + 297
"""The smallest prime above 2^256, so that every secret of 32 bytes is a number of the field."""
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(
    secret: bytes, points: Iterable[int], threshold: int, entropy: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Shares of a secret.

    Args:
        secret: 32 bytes.
        points: different numbers from 1 on, one a share.
        threshold: t, shares that rebuild the secret.
        entropy: gives so many secret random bytes.

    Raises:
        ProtocolError: not 32 bytes, fewer points than the threshold, or a point that is 0 or comes twice.
    """
    places = tuple(points)
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(places):
        raise ProtocolError(
            f"a secret has {SECRET_BYTES} bytes and 1 to {len(places)} shares rebuild it, "
            f"got {len(secret)}, {threshold}"
        )
    if len(set(places)) != len(places) or any(not 0 < x < PRIME for x in places):
        raise ProtocolError("shares need different places, from 1 on")
    coefficients = [int.from_bytes(secret, "big"), *(_element(entropy) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in places}


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret from at least ``threshold`` shares (more are not needed and not looked at).

    Raises:
        ProtocolError: too few shares, one that is no number of the field, or shares of no secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise ProtocolError(f"{threshold} shares rebuild a secret, got {len(shares)}")
    places = tuple(sorted(shares))[:threshold]
    total = 0
    for x, factor in zip(places, _at_zero(places), strict=True):
        y = int.from_bytes(shares[x], "big")
        if len(shares[x]) != SHARE_BYTES or y >= PRIME:
            raise ProtocolError(f"the share at {x} is no number of the field")
        total = (total + y * factor) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise ProtocolError("the shares do not belong to one secret")
    return total.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=256)
def _at_zero(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's factors at 0: prod_{j != i} x_j / (x_j - x_i)."""
    factors = []
    for x in places:
        above = below = 1
        for other in places:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(factors)


def _value(coefficients: list[int], x: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _element(entropy: Callable[[int], bytes]) -> int:
    """A number of the field; 48 bytes make its distance from uniform less than 2^-127."""
    return int.from_bytes(entropy(48), "big") % PRIME
