"""Report what runs, learn what should, and renew the certificate at half of its life."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from wearfleet_edge.identity import make_signing_request, needs_renewal, save_certificate
from wearfleet_edge.transport.cloud import Reported

if TYPE_CHECKING:
    from wearfleet_edge.models import ActiveModel
    from wearfleet_edge.state import StateDirectory
    from wearfleet_edge.transport.cloud import Cloud
    from wearfleet_edge.update import Updater

__all__ = ["Heartbeat", "renew_if_due"]

_LOG = logging.getLogger(__name__)

_WITHOUT_MODEL_SECONDS: Final = 1.0


class Heartbeat:
    """Keeps the reported and the wanted state in step.

    Args:
        cloud: the service.
        updater: installs what is wanted.
        active: the model in use.
        agent_version: of this agent.
        wall_ns: wall clock.
    """

    def __init__(
        self,
        *,
        cloud: Cloud,
        updater: Updater,
        active: ActiveModel,
        agent_version: str,
        wall_ns: Callable[[], int],
    ) -> None:
        self._cloud = cloud
        self._updater = updater
        self._active = active
        self._agent_version = agent_version
        self._wall_ns = wall_ns
        self.clock_error_s = 0.0

    def step(self) -> float:
        """One report; installs a wanted model and reports again at once.

        Returns:
            Seconds until the next.

        Raises:
            TransportError: the network failed.
        """
        reply = self._cloud.heartbeat(self.reported())
        self.clock_error_s = (self._wall_ns() - reply.server_unix_ns) / 1e9
        refused_before = self._updater.refusal
        if self._updater.consider(reply.desired) or self._updater.refusal != refused_before:
            return 0.0
        return (
            reply.next_after_s if self._active.installed else min(reply.next_after_s, _WITHOUT_MODEL_SECONDS)
        )

    def reported(self) -> Reported:
        """What runs now."""
        installed = self._active.installed
        return Reported(
            agent_version=self._agent_version,
            manifest_digest=installed.manifest_digest if installed else "",
            model_version=installed.manifest.version if installed else 0,
            personalised=installed is not None and self._active.recogniser.personalised,
            refusal=self._updater.refusal,
        )


def renew_if_due(cloud: Cloud, state: StateDirectory, device_id: str, now: datetime) -> bool:
    """Fetch a fresh certificate when half of the present one's life is over.

    Returns:
        True when there is a new one on disk.

    Raises:
        TransportError: the network failed.
        IntegrityError: the answer does not belong to this device; the old certificate stays.
    """
    if not needs_renewal(state, now):
        return False
    save_certificate(state, cloud.renew_certificate(make_signing_request(state, device_id)), device_id)
    _LOG.info("renewed the device's certificate on %s", now.astimezone(UTC).isoformat(timespec="seconds"))
    return True
