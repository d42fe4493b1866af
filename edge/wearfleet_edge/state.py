"""Where the agent keeps things, and writes that a power cut cannot tear."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from wearfleet_protos.errors import ConflictError, DataError

__all__ = ["StateDirectory", "atomic_write", "lock_directory", "read_json", "sync_directory", "write_json"]


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Paths below one directory that belongs to one agent.

    Args:
        root: the directory; :meth:`create` makes it.
    """

    root: Path

    @property
    def config(self) -> Path:
        """Settings of the agent, optional."""
        return self.root / "agent.toml"

    @property
    def key(self) -> Path:
        """Private key, readable by its owner only."""
        return self.root / "identity" / "device.key"

    @property
    def certificate(self) -> Path:
        """Certificate chain, leaf first."""
        return self.root / "identity" / "device.pem"

    @property
    def authority(self) -> Path:
        """Certificate of the fleet's authority."""
        return self.root / "identity" / "authority.pem"

    @property
    def enrolment(self) -> Path:
        """Who this device is and where its cloud is."""
        return self.root / "identity" / "enrolment.json"

    @property
    def outbox(self) -> Path:
        """Messages that wait for their acknowledgement."""
        return self.root / "outbox.sqlite"

    @property
    def models(self) -> Path:
        """Model slots."""
        return self.root / "models"

    @property
    def personal(self) -> Path:
        """Tensors that are laid over the model."""
        return self.root / "personal.safetensors"

    @property
    def artifacts(self) -> Path:
        """Downloads by digest, whole and partial."""
        return self.root / "artifacts"

    @property
    def federated(self) -> Path:
        """Local tensors and the result that waits for its receipt."""
        return self.root / "federated"

    @property
    def status(self) -> Path:
        """What the running agent says about itself."""
        return self.root / "status.json"

    def create(self) -> None:
        """Make the directory and those below it, closed to other users."""
        for path in (self.root, self.key.parent, self.models, self.artifacts, self.federated):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


def lock_directory(state: StateDirectory) -> IO[bytes]:
    """Make sure that one agent only runs with a directory; the lock ends with the process, however it ends.

    Returns:
        An open file that holds the lock until it is closed.

    Raises:
        ConflictError: another agent holds it.
    """
    file = (state.root / "agent.lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConflictError(
            f"another agent runs with {state.root}; stop it, or use another --state"
        ) from error
    return file


def atomic_write(path: Path, data: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Replace a file so that a reader, or a restart, sees all of the old bytes or all of the new ones.

    Args:
        path: file to replace; its folder exists.
        data: new content.
        mode: permission bits of the new file, set before the first byte is written.
        durable: wait until the bytes are on the disk; False is for files that may be lost in a power cut.
    """
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and deletions inside a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object, *, mode: int = 0o644, durable: bool = True) -> None:
    """:func:`atomic_write` of a JSON value."""
    atomic_write(path, json.dumps(value, indent=1, sort_keys=True).encode(), mode=mode, durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return cast("dict[str, Any]", value)
