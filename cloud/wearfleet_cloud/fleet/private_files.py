"""Files with secrets: readable by the service's user only, written whole or not at all."""

import os
import secrets
from pathlib import Path

from wearfleet_protos.errors import ConfigError

__all__ = ["read_private", "write_private"]


def write_private(path: Path, data: bytes) -> None:
    """Write a file with mode 0600, through a rename.

    Raises:
        ConfigError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; check service.state_dir") from error


def read_private(path: Path) -> bytes:
    """Read a secret, refusing one that others can read.

    Raises:
        ConfigError: it cannot be read, or group or others have access to it.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run chmod 600 on it")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}; check service.state_dir") from error
