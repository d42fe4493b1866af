"""What Mosquitto reads: its configuration and its access list, both generated."""

import getpass
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from wearfleet_protos.codec import MAX_PAYLOAD_BYTES

from wearfleet_cloud.fleet.identity import SERVICE_NAME, ServerFiles

__all__ = ["DEVICE_READS", "DEVICE_WRITES", "access_list", "configuration"]

DEVICE_WRITES: Final = (
    "tele/window",
    "tele/prediction",
    "tele/health",
    "evt/drift",
    "state/reported",
    "status",
)
"""Kinds of topics below its own name that a device may write."""

DEVICE_READS: Final = ("cmd/+", "state/desired")
"""Kinds of topics below its own name that a device may read."""

_IN_FLIGHT: Final = 2000
_QUEUE_BYTES: Final = 512 * 1024 * 1024
_SAVE_EVERY_S: Final = 5


def configuration(folder: Path, files: ServerFiles, host: str, port: int, max_queued: int) -> str:
    """Text of ``mosquitto.conf``.

    Mosquitto keeps what the service has not acknowledged, and saves it every few seconds and at its end; a power cut
    can take what came since the last save.
    """
    lines = (
        f"user {getpass.getuser()}",  # otherwise it gives up root before it reads our private files
        "per_listener_settings false",
        "allow_anonymous false",
        f"acl_file {folder / 'access.conf'}",
        "persistence true",
        f"persistence_location {folder}/",
        f"autosave_interval {_SAVE_EVERY_S}",
        f"max_inflight_messages {_IN_FLIGHT}",
        f"max_queued_messages {max_queued}",
        f"max_queued_bytes {_QUEUE_BYTES}",
        f"message_size_limit {MAX_PAYLOAD_BYTES}",
        "persistent_client_expiration 30d",
        "sys_interval 0",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "connection_messages false",
        f"listener {port} {host}",
        f"cafile {files.ca}",
        f"certfile {files.certificate}",
        f"keyfile {files.key}",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",  # of the listener: before it, Mosquitto would also open port 1883 to everybody
    )
    return "\n".join(lines) + "\n"


def access_list(revoked: Sequence[str]) -> str:
    """Text of the access list: the service reads all, a device only its own; a revoked one nothing."""
    lines = [
        f"user {SERVICE_NAME}",
        "topic read wearfleet/v1/#",
        "topic write wearfleet/v1/+/+/cmd/+",
        "topic write wearfleet/v1/+/+/state/desired",
    ]
    for device in sorted(revoked):
        lines += [f"user {device}", "topic deny #"]
    lines += [f"pattern write wearfleet/v1/+/%u/{kind}" for kind in DEVICE_WRITES]
    lines += [f"pattern read wearfleet/v1/+/%u/{kind}" for kind in DEVICE_READS]
    return "\n".join(lines) + "\n"
