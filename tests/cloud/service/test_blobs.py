"""Content-addressed bytes: whole or absent, checked, resumable."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
from wearfleet_cloud.service.chunk_cache import ChunkCache
from wearfleet_cloud.service.updates import UpdateStore
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_protos.chunks import CHUNK_BYTES, crc32c
from wearfleet_protos.codecs import FLOAT32, UpdateFormat
from wearfleet_protos.errors import (
    ConflictError,
    DeniedError,
    IntegrityError,
    NotFoundError,
    ProtocolError,
    ShapeError,
)
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of, encode_tensors
from wearfleet_protos.v1 import artifact_pb2

DATA = os.urandom(3 * CHUNK_BYTES + 17)
SPECS = (TensorSpec("w", "float32", (4,), TensorRole.SHARED, TensorGroup.PARAM),)
PLAIN = UpdateFormat(SPECS, FLOAT32, 1)


def joined(messages) -> bytes:
    chunks = [artifact_pb2.DownloadArtifactResponse.FromString(m).chunk for m in messages]
    assert all(chunk.crc32c == crc32c(chunk.data) for chunk in chunks)
    return b"".join(chunk.data for chunk in chunks)


@pytest.fixture
def updates(tmp_path):
    store = UpdateStore(tmp_path / "updates", 10 * CHUNK_BYTES)
    store.begin("run-1")
    return store


def take_in(updates, data, offset=0):
    digest = digest_of(data)
    with updates.open("anna-0001", digest, len(data), offset) as upload:
        upload.append(offset, data[offset:])
        updates.keep("anna-0001", digest, upload, upload.finish())


def test_what_was_put_is_read_back_under_its_digest(tmp_path):
    blobs = Blobs(tmp_path)
    digest = blobs.put(DATA)
    assert digest == digest_of(DATA)
    assert blobs.put(DATA) == digest
    assert blobs.read(digest) == DATA
    assert blobs.size(digest) == len(DATA)
    assert bytes(blobs.map(blobs.put(b""))) == b""


def test_an_unknown_artifact_is_not_found_and_a_path_is_no_digest(tmp_path):
    blobs = Blobs(tmp_path)
    with pytest.raises(NotFoundError):
        blobs.read(digest_of(b"nothing"))
    with pytest.raises(IntegrityError, match="expected a digest"):
        blobs.read("sha256:../../etc/passwd")


def test_a_file_changed_on_disk_is_refused(tmp_path):
    blobs = Blobs(tmp_path)
    digest = blobs.put(DATA)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(DATA[:-1] + b"!")
    with pytest.raises(IntegrityError, match="changed on disk"):
        blobs.read(digest)


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, len(DATA) - 1, len(DATA)])
def test_a_download_goes_on_from_any_offset(tmp_path, offset):
    blobs = Blobs(tmp_path)
    digest = blobs.put(DATA)
    cache = ChunkCache(blobs)
    assert joined(cache.messages(digest, offset)) == DATA[offset:]
    cache.add(digest, DATA)
    assert joined(cache.messages(digest, offset)) == DATA[offset:]


def test_a_download_from_beyond_the_end_is_refused(tmp_path):
    blobs = Blobs(tmp_path)
    with pytest.raises(ProtocolError, match="asked for those from"):
        ChunkCache(blobs).messages(blobs.put(b"abc"), 4)


def test_an_upload_goes_on_after_a_break_and_is_checked_at_its_end(updates):
    digest = digest_of(DATA)
    with updates.open("anna-0001", digest, len(DATA), 0) as upload:
        upload.append(0, DATA[:1000])
    assert updates.committed("anna-0001", digest) == 1000
    assert not updates.has("anna-0001", digest)
    take_in(updates, DATA, 1000)
    assert updates.has("anna-0001", digest)
    assert not updates.has("ben-0002", digest)
    assert updates.size("anna-0001", digest) == len(DATA)


def test_an_upload_from_another_offset_than_the_committed_one_is_a_conflict(updates):
    digest = digest_of(DATA)
    with pytest.raises(ConflictError, match="stands at 0"):
        updates.open("anna-0001", digest, len(DATA), 5)
    with (
        updates.open("anna-0001", digest, len(DATA), 0) as upload,
        pytest.raises(ConflictError, match="offset 7"),
    ):
        upload.append(7, b"x")


def test_an_upload_whose_bytes_do_not_match_is_thrown_away(updates):
    digest = digest_of(DATA)
    with updates.open("anna-0001", digest, len(DATA), 0) as upload:
        upload.append(0, DATA[:-1] + b"!")
        with pytest.raises(IntegrityError, match="upload again"):
            upload.finish()
    assert updates.committed("anna-0001", digest) == 0
    assert not updates.has("anna-0001", digest)


def test_more_bytes_than_announced_or_allowed_are_refused(updates):
    with updates.open("anna-0001", digest_of(b"abc"), 3, 0) as upload, pytest.raises(ProtocolError):
        upload.append(0, b"abcd")
    with pytest.raises(DeniedError, match="may have"):
        updates.open("anna-0001", digest_of(b"abc"), 11 * CHUNK_BYTES, 0)


def test_a_device_keeps_at_most_two_unfinished_uploads(updates):
    digests = [digest_of(bytes([number])) for number in range(4)]
    for number, digest in enumerate(digests):
        with updates.open("anna-0001", digest, 10, 0) as upload:
            upload.append(0, bytes(number + 1))
        os.utime(updates._part("anna-0001", digest), (number, number))
    with updates.open("anna-0001-ffff", digests[0], 10, 0) as upload:
        upload.append(0, b"xyz")
    assert [updates.committed("anna-0001", digest) for digest in digests] == [0, 0, 3, 4]
    assert updates.committed("anna-0001-ffff", digests[0]) == 3


def test_an_update_is_checked_and_read_from_memory_or_from_disk(updates):
    data = encode_tensors({"w": np.arange(4, dtype=np.float32)})
    digest = digest_of(data)
    take_in(updates, data)
    updates._arrived.clear()
    from_disk = updates.load("anna-0001", digest, PLAIN)
    asyncio.run(updates.check("anna-0001", digest, PLAIN))
    from_memory = updates.load("anna-0001", digest, PLAIN)
    np.testing.assert_array_equal(from_disk["w"], from_memory["w"])
    updates._cache.clear()
    updates._file("anna-0001", digest).write_bytes(data[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match="changed on disk"):
        updates.load("anna-0001", digest, PLAIN)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": np.zeros(5, np.float32)},
        {"w": np.zeros(4, np.float64)},
        {"v": np.zeros(4, np.float32)},
        {"w": np.full(4, np.nan, np.float32)},
        {"w": np.full(4, np.inf, np.float32)},
    ],
)
def test_an_update_that_does_not_fit_is_refused(updates, tensors):
    data = encode_tensors(tensors)
    take_in(updates, data)
    with pytest.raises(ShapeError):
        asyncio.run(updates.check("anna-0001", digest_of(data), PLAIN))


def test_a_new_round_starts_empty_and_the_one_before_the_last_is_swept(updates, tmp_path):
    take_in(updates, b"abc")
    updates.begin("run-2")
    assert not updates.has("anna-0001", digest_of(b"abc"))
    with pytest.raises(NotFoundError):
        updates.size("anna-0001", digest_of(b"abc"))
    updates.begin("run-3")
    updates.sweep()
    assert sorted(path.name for path in (tmp_path / "updates").iterdir()) == ["run-2", "run-3"]


@pytest.mark.parametrize("between", [(), ("",)])
def test_the_files_of_the_round_before_are_written_over(updates, tmp_path, between):
    take_in(updates, b"long and old")
    for tag in (*between, "run-2"):
        updates.begin(tag)
        updates.sweep()
    take_in(updates, b"new")
    files = [path for path in (tmp_path / "updates").rglob("*") if path.is_file()]
    assert files == [updates._file("anna-0001", digest_of(b"new"))]
    assert files[0].read_bytes() == b"new"


def test_a_restarted_service_finds_what_was_uploaded_in_its_round(updates, tmp_path):
    take_in(updates, b"complete")
    digest = digest_of(b"unfinished")
    with updates.open("anna-0001", digest, 10, 0) as upload:
        upload.append(0, b"unfin")
    again = UpdateStore(tmp_path / "updates", 10)
    again.begin("run-1")
    assert again.has("anna-0001", digest_of(b"complete"))
    assert not again.has("anna-0001", digest)
    assert again.committed("anna-0001", digest) == 5


def test_an_upload_that_ends_after_its_round_is_a_conflict(updates):
    with updates.open("anna-0001", digest_of(b"abc"), 3, 0) as upload:
        upload.append(0, b"abc")
        data = upload.finish()
    updates.begin("run-2")
    with pytest.raises(ConflictError, match="over"):
        updates.keep("anna-0001", digest_of(b"abc"), upload, data)
    assert not updates.has("anna-0001", digest_of(b"abc"))
