"""Where an official distribution lies (archive or unpacked folder), and its files one after the other."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from wearfleet_protos.errors import DataError

from wearfleet_cloud.data.dataset import Progress

__all__ = ["Layout", "Source", "members"]

_MAX_MEMBER_BYTES: Final = 256 << 20
_MAX_NESTED_BYTES: Final = 4 << 30
_BLOCK: Final = 1 << 20
_DAMAGED: Final = (EOFError, OSError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Source:
    """One distribution that was found: an archive file or an unpacked folder."""

    path: Path
    kind: Literal["tar", "zip", "folder"]

    def fingerprint(self) -> str:
        """Digest over name, size and modification time of the archive, or of every file of the folder."""
        files = (
            sorted(p for p in self.path.rglob("*") if p.is_file()) if self.kind == "folder" else [self.path]
        )
        digest = hashlib.sha256()
        for file in files:
            status = file.stat()
            name = file.relative_to(self.path.parent).as_posix()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Layout:
    """How to recognise a distribution below a data root.

    Args:
        folders: names below the data root that may hold it; the data root itself is tried first.
        archives: name patterns of archives (``.tar.xz``, ``.tar``, ``.zip``); the first that fits wins.
        unpacked: names of the top folder when unpacked, ``"."`` for none.
        probe: pattern of a file below that top folder which shows that it is the right one.
    """

    folders: tuple[str, ...]
    archives: tuple[str, ...]
    unpacked: tuple[str, ...]
    probe: str

    def locate(self, root: Path | None) -> Source:
        """Find the distribution; archives are preferred to folders.

        Raises:
            DataError: no data root, or nothing that fits below it; says what was looked for.
        """
        if root is None or not root.is_dir():
            raise DataError(
                f"data root {root} is not a folder; give --data-root the folder that holds the data sets"
            )
        places = [root, *(root / name for name in self.folders)]
        for place in places:
            for pattern in self.archives:
                for path in sorted(place.glob(pattern)):
                    if path.is_file():
                        return Source(path, "zip" if path.suffix == ".zip" else "tar")
        for place in places:
            for top in self.unpacked:
                if next((place / top).glob(self.probe), None) is not None:
                    return Source(place / top, "folder")
        looked = ", ".join(str(place) for place in places)
        tops = " or ".join(f"{top}/{self.probe}" for top in self.unpacked)
        raise DataError(
            f"no distribution found in {looked}: expected an archive named {' or '.join(self.archives) or '(none)'}, "
            f"or an unpacked folder with {tops}; fetch it with `wearfleet-cloud data fetch` or correct --data-root"
        )


def members(
    source: Source, wanted: re.Pattern[str], progress: Progress, max_bytes: int = _MAX_MEMBER_BYTES
) -> Iterator[tuple[re.Match[str], bytes]]:
    """Read the files whose path matches, in the order in which they lie there (folders: sorted).

    Args:
        source: what :meth:`Layout.locate` found.
        wanted: searched in each path, with forward slashes, relative to the archive or folder.
        progress: told about the bytes consumed.
        max_bytes: a larger file is refused.

    Yields:
        The match and the file's content.

    Raises:
        DataError: the archive is truncated or damaged, or a file is too large.
    """
    readers = {"tar": _tar_members, "zip": _zip_file_members, "folder": _folder_members}
    try:
        yield from readers[source.kind](source.path, wanted, progress, max_bytes)
    except _DAMAGED as error:
        raise DataError(
            f"{source.path} is truncated or damaged ({type(error).__name__}: {error}); "
            "compare its sha256 with the published one and fetch it again"
        ) from error


def _tar_members(
    path: Path, wanted: re.Pattern[str], progress: Progress, max_bytes: int
) -> Iterator[tuple[re.Match[str], bytes]]:
    total = path.stat().st_size
    with (
        path.open("rb") as raw,
        _decompressed(path, raw) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            progress(f"reading {path.name}", min(raw.tell(), total), total)
            match = wanted.search(member.name)
            if match is None or not member.isfile():
                continue
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            yield match, _bounded(content, member.name, max_bytes)
        while stream.read(_BLOCK):  # to the end, so that the check sums are verified
            pass
    progress(f"reading {path.name}", total, total)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    return raw


def _zip_file_members(
    path: Path, wanted: re.Pattern[str], progress: Progress, max_bytes: int
) -> Iterator[tuple[re.Match[str], bytes]]:
    with zipfile.ZipFile(path) as archive:
        yield from _zip_members(archive, path.name, wanted, progress, max_bytes)


def _zip_members(
    archive: zipfile.ZipFile, name: str, wanted: re.Pattern[str], progress: Progress, max_bytes: int
) -> Iterator[tuple[re.Match[str], bytes]]:
    """Files of a zip archive; an archive inside it (UCI packs some sets twice) is read as if unpacked."""
    infos = archive.infolist()
    total = sum(info.compress_size for info in infos)
    done = 0
    for info in infos:
        match = wanted.search(info.filename)
        if match is not None and not info.is_dir():
            with archive.open(info) as content:
                yield match, _bounded(content, info.filename, max_bytes)
        elif info.filename.endswith(".zip") and info.file_size <= _MAX_NESTED_BYTES:
            with tempfile.TemporaryFile() as copy, archive.open(info) as content:
                shutil.copyfileobj(content, copy, _BLOCK)
                with zipfile.ZipFile(copy) as nested:
                    yield from _zip_members(nested, info.filename, wanted, progress, max_bytes)
        done += info.compress_size
        progress(f"reading {name}", done, total)


def _folder_members(
    path: Path, wanted: re.Pattern[str], progress: Progress, max_bytes: int
) -> Iterator[tuple[re.Match[str], bytes]]:
    found = ((wanted.search(file.relative_to(path).as_posix()), file) for file in sorted(path.rglob("*")))
    files = [(match, file) for match, file in found if match is not None and file.is_file()]
    for index, (match, file) in enumerate(files):
        with file.open("rb") as content:
            yield match, _bounded(content, str(file), max_bytes)
        progress(f"reading {path.name}", index + 1, len(files))


def _bounded(content: IO[bytes], name: str, max_bytes: int) -> bytes:
    data = content.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise DataError(
            f"{name}: expected at most {max_bytes} bytes, got more; this is not the official file"
        )
    return data
