"""The only windowing, resampling and unit handling: training and the agent both use this file.

A label belongs to a window only when *every* sample of the window carries it; other windows are unlabelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np

from wearfleet_protos.errors import ShapeError
from wearfleet_protos.labels import UNLABELLED
from wearfleet_protos.recording import Channel, Recording

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "LabelledWindows",
    "StreamWindower",
    "WindowSpec",
    "convert_units",
    "cut",
    "cut_labelled",
    "resample",
    "split_again_by_time",
    "split_by_time",
    "window_starts",
]

_UNIT_SCALE: Final[dict[tuple[str, str], float]] = {
    ("g", "m/s^2"): 9.80665,
    ("m/s^2", "g"): 1.0 / 9.80665,
    ("deg/s", "rad/s"): np.pi / 180.0,
    ("rad/s", "deg/s"): 180.0 / np.pi,
    ("mV", "V"): 1e-3,
    ("V", "mV"): 1e3,
}

_MAX_RATIO: Final = 1_000
_ZERO_CROSSINGS: Final = 16


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """How a signal is cut.

    Args:
        length: samples a window.
        stride: samples from one window's start to the next.
        rate_hz: rate of the signal that is cut.

    Raises:
        ShapeError: a value is not positive.
    """

    length: int
    stride: int
    rate_hz: float

    def __post_init__(self) -> None:
        if self.length < 1 or self.stride < 1 or not self.rate_hz > 0:
            raise ShapeError(f"window length, stride and rate must be positive, got {self}")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledWindows:
    """Windows with their class: ``x`` (N, C, T) float32, ``y`` (N,) int64, ``start`` (N,) int64 sample index.

    ``recording`` (N,) int64 tells which recording a window was cut from.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    start: NDArray[np.int64]
    recording: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.y.shape[0])

    def select(self, index: NDArray[np.bool_] | NDArray[np.int64]) -> LabelledWindows:
        """The windows at ``index`` (mask or positions)."""
        return LabelledWindows(self.x[index], self.y[index], self.start[index], self.recording[index])

    def labelled(self) -> LabelledWindows:
        """Only the windows with a class."""
        return self.select(self.y != UNLABELLED)


def window_starts(num_samples: int, spec: WindowSpec) -> NDArray[np.int64]:
    """Start index of every whole window in a signal of ``num_samples``: 0, stride, 2 stride, ..."""
    return np.arange(0, max(num_samples - spec.length + 1, 0), spec.stride, dtype=np.int64)


def cut(samples: NDArray[np.float32], spec: WindowSpec) -> NDArray[np.float32]:
    """Cut a signal into windows.

    Args:
        samples: (T, C) float32.
        spec: length and stride.

    Returns:
        (N, C, length) float32, C-contiguous, N may be 0.

    Raises:
        ShapeError: ``samples`` is not (T, C).
    """
    if samples.ndim != 2:
        raise ShapeError(f"samples must be (T, C), got shape {samples.shape}")
    if samples.shape[0] < spec.length:
        return np.empty((0, samples.shape[1], spec.length), np.float32)
    view = np.lib.stride_tricks.sliding_window_view(samples, spec.length, axis=0)[:: spec.stride]
    return np.ascontiguousarray(view, dtype=np.float32)


def cut_labelled(recordings: Recording | Sequence[Recording], spec: WindowSpec) -> LabelledWindows:
    """Cut recordings into windows; a window's class is the one label all its samples carry, else -1.

    Raises:
        ShapeError: a recording has another rate than ``spec``, or the recordings differ in channels.
    """
    group = (recordings,) if isinstance(recordings, Recording) else tuple(recordings)
    return _gather(group, spec, *_places(group, spec))


def _places(
    group: Sequence[Recording], spec: WindowSpec
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(N,) label, start and recording of every window, before any is cut."""
    if not group:
        raise ShapeError("expected at least one recording, got none")
    if len({len(recording.channels) for recording in group}) != 1:
        raise ShapeError(f"recordings differ in channels: {sorted({len(r.channels) for r in group})}")
    labels, starts, sources = [], [], []
    for index, recording in enumerate(group):
        if recording.rate_hz != spec.rate_hz:
            raise ShapeError(
                f"recording has {recording.rate_hz} Hz but windows are cut at {spec.rate_hz} Hz: resample it first"
            )
        start = window_starts(len(recording.samples), spec)
        labels.append(_window_labels(recording.labels, start, spec.length))
        starts.append(start)
        sources.append(np.full(len(start), index, np.int64))
    return np.concatenate(labels), np.concatenate(starts), np.concatenate(sources)


def _gather(
    group: Sequence[Recording],
    spec: WindowSpec,
    labels: NDArray[np.int64],
    starts: NDArray[np.int64],
    sources: NDArray[np.int64],
) -> LabelledWindows:
    """Cut the windows at the given places, each copied once: a device's memory is small."""
    x = np.empty((len(labels), len(group[0].channels), spec.length), np.float32)
    for index, recording in enumerate(group):
        chosen = sources == index
        if chosen.any():
            view = np.lib.stride_tricks.sliding_window_view(recording.samples, spec.length, axis=0)
            x[chosen] = view[starts[chosen]]
    return LabelledWindows(x, labels, starts, sources)


def _window_labels(labels: NDArray[np.int16], start: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(N,) the single label of each window, or -1."""
    if len(start) == 0:
        return np.empty(0, np.int64)
    changes = np.concatenate(([0], np.cumsum(labels[1:] != labels[:-1])))
    uniform = changes[start] == changes[start + length - 1]
    return np.where(uniform, labels[start], UNLABELLED).astype(np.int64)


def split_by_time(
    recordings: Sequence[Recording], spec: WindowSpec, holdout_fraction: float
) -> tuple[LabelledWindows, LabelledWindows]:
    """Split one person's labelled windows into an earlier and a later part, class by class.

    For every class, the windows in time order (session, then start) are cut after ``1 - holdout_fraction`` of
    them; windows of the earlier part that share a sample with any window of the later part are dropped.

    Args:
        recordings: one person's recordings.
        spec: how to cut.
        holdout_fraction: share of each class that becomes the later part, in (0, 1).

    Returns:
        (earlier, later) windows; no sample is in both.

    Raises:
        ShapeError: the fraction is not in (0, 1).
    """
    ordered = sorted(recordings, key=lambda r: r.session)
    labels, starts, sources = _places(ordered, spec)
    known = labels != UNLABELLED
    labels, starts, sources = labels[known], starts[known], sources[known]
    masks = _by_time(labels, starts, sources, spec.length, holdout_fraction)
    parts = (_gather(ordered, spec, labels[p], starts[p], sources[p]) for p in masks)
    return next(parts), next(parts)


def split_again_by_time(
    windows: LabelledWindows, length: int, fraction: float
) -> tuple[LabelledWindows, LabelledWindows]:
    """Split a part of :func:`split_by_time` like that once more.

    Args:
        windows: in time order.
        length: of a window, samples.
        fraction: share of each class that becomes the later part, in (0, 1).

    Returns:
        (earlier, later) windows; no sample is in both.

    Raises:
        ShapeError: the fraction is not in (0, 1).
    """
    earlier, later = _by_time(windows.y, windows.start, windows.recording, length, fraction)
    return windows.select(earlier), windows.select(later)


def _by_time(
    labels: NDArray[np.int64],
    starts: NDArray[np.int64],
    sources: NDArray[np.int64],
    length: int,
    fraction: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks (N,) of the earlier and the later part."""
    if not 0.0 < fraction < 1.0:
        raise ShapeError(f"holdout_fraction must be between 0 and 1, got {fraction}")
    later = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)  # already in time order
        later[of_class[len(of_class) - round(len(of_class) * fraction) :]] = True
    return ~later & ~_touches(starts, sources, later, length), later


def _touches(
    starts: NDArray[np.int64], sources: NDArray[np.int64], later: NDArray[np.bool_], length: int
) -> NDArray[np.bool_]:
    """(N,) True where a window shares a sample with a window of the later part."""
    clash = np.zeros(len(starts), np.bool_)
    for source in np.unique(sources):
        here = sources == source
        held = np.sort(starts[here & later])
        if len(held) == 0:
            continue
        own = starts[here]
        right = np.searchsorted(held, own, side="left")
        gap_right = held[np.minimum(right, len(held) - 1)] - own
        gap_left = own - held[np.maximum(right - 1, 0)]
        near = ((gap_right >= 0) & (gap_right < length)) | ((gap_left >= 0) & (gap_left < length))
        clash[here] = near
    return clash


class StreamWindower:
    """Cut a stream that arrives in pieces; the windows equal those of :func:`cut` on the whole signal.

    Args:
        spec: length and stride.
        num_channels: C.
    """

    def __init__(self, spec: WindowSpec, num_channels: int) -> None:
        self._spec = spec
        self._channels = num_channels
        self._buffer = np.empty((0, num_channels), np.float32)
        self._origin = 0  # sample index of the buffer's first row
        self._next = 0  # sample index of the next window's start

    def push(self, samples: NDArray[np.float32]) -> list[tuple[int, NDArray[np.float32]]]:
        """Add samples and return the windows that became complete.

        Args:
            samples: (n, C) float32, n may be 0.

        Returns:
            (start sample index, (C, length) float32 contiguous) for each new window.

        Raises:
            ShapeError: wrong number of channels, or a value that is not finite.
        """
        if samples.ndim != 2 or samples.shape[1] != self._channels:
            raise ShapeError(f"expected samples (n, {self._channels}), got shape {samples.shape}")
        if not bool(np.isfinite(samples).all()):
            raise ShapeError("samples hold NaN or infinity; check the sensor")
        self._buffer = np.concatenate((self._buffer, samples.astype(np.float32, copy=False)))
        done: list[tuple[int, NDArray[np.float32]]] = []
        offset = self._next - self._origin
        while offset + self._spec.length <= len(self._buffer):
            window = np.ascontiguousarray(self._buffer[offset : offset + self._spec.length].T)
            done.append((self._origin + offset, window))
            offset += self._spec.stride
        self._next = self._origin + offset
        drop = min(offset, len(self._buffer))
        self._buffer = self._buffer[drop:]
        self._origin += drop
        return done


def resample(samples: NDArray[np.float32], from_hz: float, to_hz: float) -> NDArray[np.float32]:
    """Change the rate by a rational factor with a windowed-sinc low-pass filter; no delay, deterministic.

    Args:
        samples: (T, C) float32.
        from_hz: rate of ``samples``.
        to_hz: wanted rate; the ratio must be a fraction with terms up to 1 000.

    Returns:
        (ceil(T * to_hz / from_hz), C) float32; the ends are padded by repeating the first and last sample.

    Raises:
        ShapeError: not (T, C), or a rate that is not positive or not a small fraction.

    Source:
        polyphase form of the band-limited interpolator; Kaiser window with beta 8.6, 16 zero crossings a side.
    """
    if samples.ndim != 2 or not from_hz > 0 or not to_hz > 0:
        raise ShapeError(
            f"resample needs (T, C) samples and positive rates, got {samples.shape}, {from_hz}, {to_hz}"
        )
    ratio = Fraction(to_hz).limit_denominator(1_000_000) / Fraction(from_hz).limit_denominator(1_000_000)
    up, down = ratio.numerator, ratio.denominator
    if up > _MAX_RATIO or down > _MAX_RATIO:
        raise ShapeError(f"rates {from_hz} and {to_hz} Hz are not related by a small fraction ({up}/{down})")
    if up == down or len(samples) == 0:
        return samples.astype(np.float32, copy=True)
    count = -(-len(samples) * up // down)
    cutoff = min(1.0, up / down)  # relative to the input's Nyquist frequency
    half = int(np.ceil(_ZERO_CROSSINGS / cutoff))
    offsets = np.arange(-half, half + 1)
    distance = np.arange(up)[:, None] / up - offsets[None, :]
    taps = cutoff * np.sinc(cutoff * distance) * _kaiser(distance / (half + 1))  # of each phase
    taps /= taps.sum(axis=1, keepdims=True)
    position = np.arange(count, dtype=np.int64) * down
    base, phase = position // up, position % up
    out = np.empty((count, samples.shape[1]), np.float64)
    for begin in range(0, count, 4096):  # bounded memory
        part = slice(begin, min(begin + 4096, count))
        index = np.clip(base[part, None] + offsets[None, :], 0, len(samples) - 1)
        out[part] = np.einsum("nk,nkc->nc", taps[phase[part]], samples[index].astype(np.float64))
    return out.astype(np.float32)


def _kaiser(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kaiser window with beta 8.6 on [-1, 1], zero outside."""
    inside = np.clip(1.0 - x**2, 0.0, 1.0)
    weights: NDArray[np.float64] = np.i0(8.6 * np.sqrt(inside)) / np.i0(8.6) * (np.abs(x) <= 1.0)
    return weights


def convert_units(
    samples: NDArray[np.float32], have: Sequence[Channel], want: Sequence[Channel]
) -> NDArray[np.float32]:
    """Scale columns from the units of ``have`` to those of ``want``.

    Args:
        samples: (T, C) float32.
        have: C channels as they come.
        want: C channels of the same names in the same order.

    Returns:
        (T, C) float32, a new array.

    Raises:
        ShapeError: other names, or no known conversion; says which.
    """
    if [c.name for c in have] != [c.name for c in want]:
        raise ShapeError(f"expected channels {[c.name for c in want]}, got {[c.name for c in have]}")
    out = samples.astype(np.float32, copy=True)
    for index, (source, target) in enumerate(zip(have, want, strict=True)):
        if source.unit == target.unit:
            continue
        scale = _UNIT_SCALE.get((source.unit, target.unit))
        if scale is None:
            raise ShapeError(f"channel {source.name}: no conversion from {source.unit!r} to {target.unit!r}")
        out[:, index] = samples[:, index].astype(np.float64) * scale
    return out
