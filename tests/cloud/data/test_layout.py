"""Finding a distribution and reading its files from archives and folders."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from wearfleet_cloud.data.layout import Layout, Source, members
from wearfleet_protos.errors import DataError

FILES = {"set/a1.txt": b"one" * 5000, "set/a2.txt": bytes(range(256)) * 400, "set/other.md": b"no"}
WANTED = re.compile(r"a(\d)\.txt$")
LAYOUT = Layout(
    folders=("my-set",), archives=("my*.tar.xz", "my*.zip"), unpacked=("set", "."), probe="a1.txt"
)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total, what


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)


def write_zip_in_zip(path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("readme.txt", "outer")
        outer.writestr("my set.zip", inner.getvalue())


def write_folder(path: Path) -> None:
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.mark.parametrize("place", [".", "my-set"])
@pytest.mark.parametrize(
    ("writer", "name"),
    [(write_tar, "my-1.tar.xz"), (write_zip, "my.zip"), (write_zip_in_zip, "my.zip"), (write_folder, "")],
)
def test_every_packing_gives_the_same_files(tmp_path: Path, place: str, writer, name: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    writer(tmp_path / place / name)
    source = LAYOUT.locate(tmp_path)
    found = {match[1]: content for match, content in members(source, WANTED, quiet)}
    assert found == {"1": FILES["set/a1.txt"], "2": FILES["set/a2.txt"]}


@pytest.mark.parametrize(
    ("writer", "name"), [(write_tar, "my.tar.xz"), (write_zip_in_zip, "my.zip"), (write_folder, "")]
)
def test_a_file_above_the_limit_is_refused(tmp_path: Path, writer, name: str) -> None:
    writer(tmp_path / name)
    largest = max(len(FILES["set/a1.txt"]), len(FILES["set/a2.txt"]))
    source = LAYOUT.locate(tmp_path)
    assert len(list(members(source, WANTED, quiet, largest))) == 2
    with pytest.raises(DataError, match=f"expected at most {largest - 1} bytes"):
        list(members(source, WANTED, quiet, largest - 1))


def test_the_folder_itself_may_be_the_data_root(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert LAYOUT.locate(tmp_path / "set") == Source(tmp_path / "set" / ".", "folder")


def test_the_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    write_folder(tmp_path)
    before = LAYOUT.locate(tmp_path).fingerprint()
    assert LAYOUT.locate(tmp_path).fingerprint() == before
    (tmp_path / "set" / "a2.txt").write_bytes(b"shorter")
    assert LAYOUT.locate(tmp_path).fingerprint() != before


@pytest.mark.parametrize(("writer", "name"), [(write_tar, "my.tar.xz"), (write_zip, "my.zip")])
def test_an_archive_cut_off_anywhere_is_a_data_error(tmp_path: Path, writer, name: str) -> None:
    path = tmp_path / name
    writer(path)
    whole = path.read_bytes()
    for keep in sorted({0, 1, 20, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1}):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="truncated or damaged"):
            list(members(LAYOUT.locate(tmp_path), WANTED, quiet))


def test_a_nested_archive_cut_off_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "my.zip"
    write_zip_in_zip(path)
    whole = path.read_bytes()
    for keep in (0, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="truncated or damaged"):
            list(members(LAYOUT.locate(tmp_path), WANTED, quiet))


def test_a_flipped_bit_is_a_data_error(tmp_path: Path) -> None:
    for writer, name in ((write_tar, "my.tar.xz"), (write_zip, "my.zip")):
        path = tmp_path / name
        writer(path)
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 3] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="fetch it again"):
            list(members(LAYOUT.locate(tmp_path), WANTED, quiet))
        path.unlink()


def test_a_wrong_root_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"my\*\.tar\.xz or my\*\.zip.*set/a1\.txt"):
        LAYOUT.locate(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        LAYOUT.locate(tmp_path / "missing")
    with pytest.raises(DataError, match="--data-root"):
        LAYOUT.locate(None)
