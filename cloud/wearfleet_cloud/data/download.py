"""Download an official distribution: resumable, bounded in size, verified, never half-written under its final name."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from wearfleet_protos.errors import ConfigError, IntegrityError, TransportError

from wearfleet_cloud.data.dataset import Download, Progress, silent

__all__ = ["fetch", "sha256_of"]

_BLOCK: Final = 1 << 18
_TIMEOUT_S: Final = 30.0


def fetch(download: Download, folder: Path, progress: Progress = silent) -> tuple[Path, str]:
    """Download one archive, continuing an earlier attempt, and verify it.

    Bytes gather in ``<file>.part``; a broken connection leaves them for the next call to continue. Only a complete
    and verified file gets its name. A file that is already there is verified and kept.

    Args:
        download: address, name, digest (empty: nothing to compare with) and largest size.
        folder: made when missing.
        progress: told about bytes.

    Returns:
        The file and its sha256 as hex digits.

    Raises:
        ConfigError: the address is not http(s).
        TransportError: no network, refused, or broken off (retryable); not found and the like (not retryable).
        IntegrityError: larger than allowed, or another digest than the published one; the bytes are removed.
    """
    if not download.address.startswith(("https://", "http://")):
        raise ConfigError(f"expected an http or https address, got {download.address!r}")
    target = folder / download.file_name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        _transfer(download, part, progress)
        digest = _verified(part, download)
        part.replace(target)
        return target, digest
    return target, _verified(target, download)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path, download: Download) -> str:
    digest = sha256_of(path)
    if download.sha256 and digest != download.sha256:
        path.unlink()
        raise IntegrityError(
            f"{download.address}: expected sha256 {download.sha256}, got {digest}; the file was removed, fetch it "
            "again or, if the official file has changed, give its new digest with --sha256"
        )
    return digest


def _transfer(download: Download, part: Path, progress: Progress) -> None:
    """Append what is missing to ``part``."""
    have = part.stat().st_size if part.is_file() else 0
    # The scheme was checked to be http(s).
    request = urllib.request.Request(download.address, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            continued = answer.status == http.client.PARTIAL_CONTENT
            have = have if continued else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else 0
            if total > download.max_bytes:
                raise _too_large(download, part, total)
            with part.open("ab" if continued else "wb") as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    have += len(block)
                    if have > download.max_bytes:
                        raise _too_large(download, part, have)
                    progress(f"downloading {download.file_name}", have, max(total, have))
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return  # everything was there already; the digest decides
        raise TransportError(
            f"{download.address} answered {error.code} {error.reason}", retryable=error.code >= 500
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(
            f"cannot download {download.address} ({error}); check the network, or place the archive by hand at "
            f"{part.with_suffix('')}; what has arrived is kept and continued by the next attempt"
        ) from error
    if total and have < total:
        raise TransportError(
            f"{download.address} broke off after {have} of {total} bytes; fetch again to continue"
        )


def _too_large(download: Download, part: Path, size: int) -> IntegrityError:
    part.unlink(missing_ok=True)
    return IntegrityError(
        f"{download.address}: expected at most {download.max_bytes} bytes, got {size} or more; raise --max-mb if it is "
        "the right file"
    )
