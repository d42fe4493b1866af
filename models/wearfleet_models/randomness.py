"""Counter-based random numbers in plain tensor arithmetic.

Every number is a function of (key, salt, position), so there is no generator to carry, a step stays pure, a
resumed run draws what the uninterrupted one would have drawn, and a graph exported to ONNX draws the same
bits as torch. Only integer add, multiply, divide, and, xor are used: ONNX opset 18 has them all for int64,
and every product stays below 2**63. ``rng`` is a key: a non-negative int64 scalar; under
``torch.func.vmap`` it may be batched.

Source: integer finaliser of the form xor-shift, multiply (Wellons 2018, "hash prospector", two-multiplier
family with both multipliers below 2**31); normal numbers: Box and Muller 1958; gamma numbers: Marsaglia and
Tsang 2000, "A simple method for generating gamma variables", ACM TOMS 26(3).
Differs: a gamma number takes the first acceptable of a fixed count of candidates (rejected at most 5 %
each), so that the amount of work does not depend on the data.
"""

import math
from typing import Final

import torch
from torch import Tensor

__all__ = ["beta", "bits", "derive", "integers", "normal", "permutation", "uniform"]

_MASK: Final = 0xFFFFFFFF
_GAMMA_CANDIDATES: Final = 12


def derive(rng: Tensor, salt: int | Tensor) -> Tensor:
    """A new key from a key and a number: for a step, a domain, a client, a use.

    Args:
        rng: () int64 key, not negative.
        salt: what the new key is for, 0 <= salt < 2**32; an int64 tensor of any shape for many keys at once.

    Returns:
        Keys below 2**62, int64, of the shape of ``salt``.
    """
    low, high = _key_words(rng, salt)
    return low + (high & 0x3FFFFFFF) * 4294967296


def bits(rng: Tensor, salt: int, shape: tuple[int, ...]) -> Tensor:
    """Independent uniform 32-bit integers.

    Args:
        rng: () int64 key, not negative.
        salt: stream within the key, 0 <= salt < 2**32.
        shape: of the result.

    Returns:
        ``shape`` int64 in [0, 2**32).
    """
    low, high = _key_words(rng, salt)
    counter = torch.arange(math.prod(shape), dtype=torch.int64, device=rng.device).reshape(shape)
    return _mix(_mix((counter + low) & _MASK) ^ high)


def uniform(rng: Tensor, salt: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1): ``shape`` float32, multiples of 2**-24 (so 1.0 is never reached)."""
    return (bits(rng, salt, shape) // 256).to(torch.float32) * (1.0 / 16777216.0)


def integers(rng: Tensor, salt: int, shape: tuple[int, ...], high: Tensor) -> Tensor:
    """Uniform integers below a bound, with replacement.

    Args:
        rng: () int64 key, not negative.
        salt: stream within the key.
        shape: of the result.
        high: int64, broadcastable to ``shape``, 1 <= high < 2**31.

    Returns:
        ``shape`` int64 in [0, high); the bias is below high / 2**32.
    """
    return (bits(rng, salt, shape) * high) // 4294967296


def normal(rng: Tensor, salt: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers: ``shape`` float32 (Box-Muller, cosine branch)."""
    both = uniform(rng, salt, (2, *shape))
    radius = torch.sqrt(-2.0 * torch.log(both[0] + (0.5 / 16777216.0)))
    return radius * torch.cos((2.0 * math.pi) * both[1])


def permutation(rng: Tensor, salt: int, size: int) -> Tensor:
    """A random order of ``size`` things: (size,) int64, each of 0..size-1 once."""
    return torch.argsort(uniform(rng, salt, (size,)))


def beta(rng: Tensor, salt: int, alpha: Tensor) -> Tensor:
    """A number from the symmetric Beta(alpha, alpha).

    Args:
        rng: () int64 key, not negative.
        salt: stream within the key.
        alpha: () float32 concentration, > 0.

    Returns:
        () float32 in [0, 1].
    """
    log_gamma = _log_gamma_numbers(derive(rng, salt), alpha)
    return torch.sigmoid(log_gamma[0] - log_gamma[1])


def _log_gamma_numbers(rng: Tensor, alpha: Tensor) -> Tensor:
    """Logarithms of two independent Gamma(alpha) numbers: (2,) float32; in logarithms small alpha is safe."""
    shape = (2, _GAMMA_CANDIDATES)
    d = alpha + (1.0 - 1.0 / 3.0)  # Gamma(alpha + 1) is drawn, then boosted down by U**(1/alpha)
    x = normal(rng, 0, shape)
    cube_root = torch.clamp(1.0 + x / torch.sqrt(9.0 * d), min=1e-6)
    log_v = 3.0 * torch.log(cube_root)
    log_u = torch.log(uniform(rng, 1, shape) + (0.5 / 16777216.0))
    accepted = log_u < 0.5 * x * x + d * (1.0 - cube_root**3 + log_v)
    first = torch.argmax(accepted.to(torch.int64), dim=1, keepdim=True)
    boost = torch.log(uniform(rng, 2, (2,)) + (0.5 / 16777216.0)) / alpha
    return torch.log(d) + torch.gather(log_v, 1, first)[:, 0] + boost


def _key_words(rng: Tensor, salt: int | Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words that depend on every bit of the key and of the salt."""
    low = _mix((rng & _MASK) ^ 0x5BF03635)
    high = _mix((rng // 4294967296) ^ low)
    low = _mix((low + salt) & _MASK)
    return low, _mix(high ^ _mix(low ^ 0x27D4EB2F))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) in which every input bit reaches every output bit."""
    x = ((x ^ (x // 4096)) * 0x2C1B3C6D) & _MASK
    x = ((x ^ (x // 4096)) * 0x297A2D39) & _MASK
    return x ^ (x // 32768)
