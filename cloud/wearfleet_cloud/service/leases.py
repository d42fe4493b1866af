"""Leases of devices at work: every sign of life renews one; a silent one is suspect, and then lost.

In memory only. One budget says it all: how long a device of a class may be silent. How often it reports its progress,
and when it is given up, follow from that.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["DeviceClass", "LeaseState", "Leases"]

_GRACE: Final = 0.5
"""A suspect device has so much of its lease's time left to be heard of."""


class DeviceClass(StrEnum):
    """What a device is, as it says itself; one that does not is taken for a wearable."""

    GATEWAY = "gateway"
    PHONE = "phone"
    WEARABLE = "wearable"


class LeaseState(StrEnum):
    """What is to be thought of a device at work."""

    LIVE = "live"
    SUSPECT = "suspect"
    LOST = "lost"


@dataclass(slots=True)
class _Lease:
    heard: float
    kind: DeviceClass = DeviceClass.WEARABLE


class Leases:
    """When each device was heard of.

    Args:
        lease_s: longest silence that is no reason for concern, by class.
        clock: seconds, never set back.
    """

    def __init__(
        self, lease_s: Mapping[DeviceClass, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._leases: dict[str, _Lease] = {}

    def renew(self, device_id: str, kind: DeviceClass | None = None) -> None:
        """A device is heard of now; ``kind`` when it says what it is."""
        lease = self._leases.setdefault(device_id, _Lease(0.0))
        lease.heard = self._clock()
        lease.kind = kind or lease.kind

    def seconds(self, device_id: str) -> float:
        """Longest silence of this device that is no reason for concern."""
        return self._lease_s[self._leases.get(device_id, _Lease(0.0)).kind]

    def state(self, device_id: str) -> LeaseState:
        """What is to be thought of a device; one that has no lease begins one now."""
        if device_id not in self._leases:
            self.renew(device_id)
        silent, lease_s = self._clock() - self._leases[device_id].heard, self.seconds(device_id)
        if silent <= lease_s:
            return LeaseState.LIVE
        return LeaseState.SUSPECT if silent <= (1.0 + _GRACE) * lease_s else LeaseState.LOST

    def lost(self, devices: Iterable[str]) -> tuple[str, ...]:
        """Those of some devices that are lost."""
        return tuple(device for device in devices if self.state(device) == LeaseState.LOST)
