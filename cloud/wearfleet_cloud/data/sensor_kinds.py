"""Which channels of a window come from the same kind of sensor, read from their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wearfleet_protos.recording import Channel

__all__ = ["sensor_kinds"]


def sensor_kinds(channels: Sequence[Channel]) -> tuple[int, ...]:
    """The kind of sensor of each channel: the last word of its name, axis and number apart.

    ``acc_x``, ``torso_acc_y`` and ``left_leg_acc_z`` are one kind, ``chest_ecg_2`` and ``ecg`` are one. The unit does
    not count: ECG and EMG share the volt, and accelerometers differ in theirs. Channels that are named by place alone
    (DSADS as devices: ``torso_x``, ``left_leg_x``) fall into kinds of place.

    Args:
        channels: C, at least one.

    Returns:
        (C,) numbers 0, 1, ... in the order in which the kinds first come.
    """
    names = [_kind(channel.name) for channel in channels]
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)


def _kind(name: str) -> str:
    *before, last = name.split("_")
    axis = last in {"x", "y", "z"} or last.isdigit()
    return before[-1] if axis and before else last
