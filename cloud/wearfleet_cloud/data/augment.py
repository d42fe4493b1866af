"""Seven random changes of a window that leave its activity what it is, on the device and for all windows at once.

Every transform is a resampling in time (two neighbours and how far between them), a gain, a rotation of the triads of
axes and a noise; what a transform does not change stays neutral. So windows of different transforms go through the same
operations, without a branch, also under ``torch.func.vmap``.

Source: Um et al. 2017, arXiv:1706.00527, with the settings of Qin et al. 2023, arXiv:2306.04641; specs/ood.md 3.5
and 4.11.
Differs: segments of a permutation are drawn at once, with the same probability for each division as drawing until one
fits; in windows of fewer than 44 samples they are at least a quarter of the window. A curve that would run backwards in
time stands still instead. Channels beyond the last whole triad are not rotated.
"""

import math
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_protos.errors import ShapeError

__all__ = ["TRANSFORMS", "Draws", "apply_transforms", "augment", "draw", "jitter"]

TRANSFORMS: Final = (
    "jitter",
    "scaling",
    "magnitude warp",
    "time warp",
    "rotation",
    "permutation",
    "random sampling",
)
"""By number."""
_JITTER, _SCALING, _MAGNITUDE, _TIME, _ROTATION, _PERMUTATION, _SAMPLING = range(len(TRANSFORMS))

_SCALE: Final = 0.1
_WARP: Final = 0.2
_KNOTS: Final = 6
_SEGMENTS: Final = 4
_SHORTEST: Final = 11
_KEPT: Final = 0.4
_SLOWEST: Final = 1e-3
_LEAST_SAMPLES: Final = 8
_NOISE, _CURVE, _TURN, _CUTS, _ORDER, _POINTS = range(2_000, 2_006)


class Draws(NamedTuple):
    """The random numbers behind one augmented copy of N windows; G = C / 3, rounded up, triads.

    Args:
        noise: (N, C, T) standard normal.
        knots: (N, C, 6) standard normal: of curves, the first of scaling.
        turn: (N, G, 4) in [0, 1): axis and angle.
        lengths: (N, G, 4) int64 samples of each segment.
        order: (N, G, 4) int64 which segment comes first, second, ...
        kept: (N, C, 0.4 T) int64 sample points, ascending, the first and the last among them.
    """

    noise: Tensor
    knots: Tensor
    turn: Tensor
    lengths: Tensor
    order: Tensor
    kept: Tensor


def augment(x: Tensor, transform: Tensor, rng: Tensor, noise: Tensor) -> Tensor:
    """A changed copy of every window.

    Args:
        x: (N, C, T) any unit, T >= 8; axes x, y, z of a sensor in neighbouring channels.
        transform: (N,) int64 number of the transform of each window, of :data:`TRANSFORMS`.
        rng: () int64 key.
        noise: (C,) standard deviation of the jitter, in the unit of the channel.

    Returns:
        (N, C, T), channels innermost in memory.

    Raises:
        ShapeError: windows too short.
    """
    return apply_transforms(x, transform, draw(rng, *x.shape), noise)


def jitter(x: Tensor, rng: Tensor, noise: Tensor) -> Tensor:
    """The first transform alone; arguments and result as for :func:`augment`."""
    return x + noise[:, None] * randomness.normal(rng, _NOISE, tuple(x.shape))


def draw(rng: Tensor, windows: int, channels: int, samples: int) -> Draws:
    """The random numbers of one augmented copy: pure in ``rng``, () int64.

    Raises:
        ShapeError: windows too short.
    """
    if samples < _LEAST_SAMPLES:
        raise ShapeError(f"augmentation needs windows of at least {_LEAST_SAMPLES} samples, got {samples}")
    triads = (windows, -(-channels // 3))
    inner = max(int(_KEPT * samples), 2) - 2
    last = torch.full((), samples - 2, device=rng.device)
    points = randomness.integers(rng, _POINTS, (windows, channels, inner), last) + 1
    ends = points.new_zeros(windows, channels, 1)
    return Draws(
        noise=randomness.normal(rng, _NOISE, (windows, channels, samples)),
        knots=randomness.normal(rng, _CURVE, (windows, channels, _KNOTS)),
        turn=randomness.uniform(rng, _TURN, (*triads, 4)),
        lengths=_lengths(rng, triads, samples),
        order=randomness.uniform(rng, _ORDER, (*triads, _SEGMENTS)).argsort(dim=-1),
        kept=torch.cat((ends, points.sort(dim=-1).values, ends + (samples - 1)), dim=-1),
    )


def apply_transforms(x: Tensor, transform: Tensor, draws: Draws, noise: Tensor) -> Tensor:
    """As :func:`augment`, with the random numbers given."""
    which = transform[:, None, None]
    curve = 1.0 + _WARP * draws.knots @ _curves(x.shape[2]).to(x)
    first, second, between = _neighbours(which, curve, draws)
    moved = torch.lerp(x.gather(2, first), x.gather(2, second), between)
    gain = torch.where(which == _SCALING, 1.0 + _SCALE * draws.knots[..., :1], 1.0)
    moved = moved * torch.where(which == _MAGNITUDE, curve, gain)
    turned = _rotated(moved, draws.turn)
    moved = torch.where(which == _ROTATION, turned, moved)
    moved = moved + torch.where(which == _JITTER, noise[:, None] * draws.noise, 0.0)
    return moved.mT.contiguous().mT


def _neighbours(which: Tensor, curve: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Of every new sample: two old ones (N, C, T) and where between them it lies, 0 to 1.

    Old sample ``source[j]`` stands at time ``at[j]``, in ascending order; a new sample at a whole time lies between two
    of these.
    """
    channels, samples = curve.shape[1:]
    times = torch.arange(samples, device=curve.device)
    whole = times.expand(curve.shape)
    kept = torch.nn.functional.pad(draws.kept, (0, samples - draws.kept.shape[2]), value=samples - 1)
    source = torch.where(which == _SAMPLING, kept, whole)
    at = torch.where(which == _TIME, _warped(curve), source.to(curve.dtype))
    stop = at.ceil().long().clamp(0, samples - 1)  # at that time and after, the old sample is behind
    passed = torch.zeros_like(source).scatter_add(2, stop, torch.ones_like(source)).cumsum(dim=2)
    below = (passed - 1).clamp(0, samples - 2)
    start, end = at.gather(2, below), at.gather(2, below + 1)
    between = ((whole - start) / (end - start).clamp(min=1e-6)).clamp(0.0, 1.0)
    triad = torch.arange(channels, device=curve.device) // 3
    shuffled = _shuffled(draws, times)[:, triad]
    swapped = which == _PERMUTATION
    return (
        torch.where(swapped, shuffled, source.gather(2, below)),
        torch.where(swapped, shuffled, source.gather(2, below + 1)),
        torch.where(swapped, 0.0, between),
    )


def _warped(curve: Tensor) -> Tensor:
    """(N, C, T) times of the old samples when time runs at the speed of a curve, scaled to end at T - 1."""
    elapsed = curve.clamp(min=_SLOWEST).cumsum(dim=2)
    return elapsed * ((curve.shape[2] - 1) / elapsed[..., -1:])


def _shuffled(draws: Draws, times: Tensor) -> Tensor:
    """(N, G, T) int64 old sample at every time after the segments were put in their new order."""
    starts = (draws.lengths.cumsum(dim=-1) - draws.lengths).gather(-1, draws.order)
    lengths = draws.lengths.gather(-1, draws.order)
    begins = lengths.cumsum(dim=-1) - lengths
    segment = (times >= begins[..., 1:, None]).sum(dim=-2)
    return times + (starts - begins).gather(-1, segment)


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    """(N, C, T) with every whole triad turned by an angle of -pi to pi about an axis from the unit cube."""
    whole = x.shape[1] // 3
    axis = torch.nn.functional.normalize(2.0 * turn[:, :whole, :3] - 1.0, dim=-1)[..., None]
    angle = (math.pi * (2.0 * turn[:, :whole, 3] - 1.0))[..., None, None]
    triads = x[:, : 3 * whole].reshape(x.shape[0], whole, 3, x.shape[2])
    across = torch.linalg.cross(axis.expand_as(triads), triads, dim=2)
    along = (axis * triads).sum(dim=2, keepdim=True) * axis
    turned = torch.cos(angle) * (triads - along) + along + torch.sin(angle) * across
    return torch.cat((turned.flatten(1, 2), x[:, 3 * whole :]), dim=1)


def _lengths(rng: Tensor, triads: tuple[int, int], samples: int) -> Tensor:
    """(N, G, 4) int64: a division of the samples into four segments of at least 11, every one equally likely.

    Stars and bars: what exceeds the least lengths, and three bars, stand in a row; a random triple of its places is
    for the bars.
    """
    least = min(_SHORTEST, samples // _SEGMENTS)
    places = samples - _SEGMENTS * least + _SEGMENTS - 1
    room = torch.arange(places, places - 3, -1, device=rng.device)
    one, two, three = randomness.integers(rng, _CUTS, (*triads, 3), room).unbind(-1)
    two = two + (two >= one).long()  # the second of the places that the first left, and so on
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    three = three + (three >= low).long()
    three = three + (three >= high).long()
    bars = torch.stack((one, two, three), dim=-1).sort(dim=-1).values
    edges = (
        torch.nn.functional.pad(bars, (1, 0), value=-1),
        torch.nn.functional.pad(bars, (0, 1), value=places),
    )
    return edges[1] - edges[0] - 1 + least


@lru_cache
def _curves(samples: int) -> Tensor:
    """(6, T) float64: from values at six equally spaced knots to the cubic spline through them, its ends not-a-knot.

    Without a knot at the second and the last but one value, that is the span of 1, s, s^2, s^3, (s - 2)+^3, (s - 3)+^3.
    """
    places = torch.arange(_KNOTS, dtype=torch.float64)
    s = torch.linspace(0, _KNOTS - 1, samples, dtype=torch.float64)
    curves: Tensor = torch.linalg.solve(_span(places), _span(s), left=False).T
    return curves


def _span(s: Tensor) -> Tensor:
    """(S, 6) the six functions at every place."""
    powers = [s**n for n in range(4)]
    return torch.stack([*powers, (s - 2.0).clamp(min=0.0) ** 3, (s - 3.0).clamp(min=0.0) ** 3], dim=1)
