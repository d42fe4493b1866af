"""What may leave the device. The wearer's settings decide; nothing in the cloud can change them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wearfleet_edge.config import PolicyConfig

__all__ = ["SharingPolicy", "sharing_policy"]


@dataclass(frozen=True, slots=True)
class SharingPolicy:
    """Decisions on each kind of data.

    Args:
        raw_windows: sensor samples may be sent.
        annotations: stated activities may be sent.
    """

    raw_windows: bool
    annotations: bool


def sharing_policy(config: PolicyConfig) -> SharingPolicy:
    """The policy that the settings ask for."""
    return SharingPolicy(raw_windows=config.share_raw_windows, annotations=config.share_annotations)
