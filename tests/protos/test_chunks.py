"""Chunks written and read without protobuf objects are the bytes that protobuf writes and reads."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from wearfleet_protos.chunks import RECEIVED_CHUNK, SENT_CHUNK, chunk_message, crc32c, split_chunk
from wearfleet_protos.errors import ProtocolError
from wearfleet_protos.v1 import artifact_pb2, federation_pb2

DATA = bytes(range(256)) * 3
KINDS = (
    (RECEIVED_CHUNK, artifact_pb2.DownloadArtifactResponse),
    (RECEIVED_CHUNK, federation_pb2.WorkResponse),
    (SENT_CHUNK, artifact_pb2.UploadArtifactRequest),
    (SENT_CHUNK, federation_pb2.WorkRequest),
)


@pytest.mark.parametrize(("field", "kind"), KINDS)
@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**20, 2**63])
def test_protobuf_reads_what_is_written_here(field, kind, offset):
    chunk = kind.FromString(chunk_message(field, offset, memoryview(DATA))).chunk
    assert (chunk.offset, chunk.data, chunk.crc32c) == (offset, DATA, crc32c(DATA))


@pytest.mark.parametrize(("field", "kind"), KINDS)
@given(offset=st.integers(0, 2**64 - 1), data=st.binary(max_size=300), checksum=st.integers(0, 2**32 - 1))
def test_what_protobuf_writes_is_read_here(field, kind, offset, data, checksum):
    message = kind(chunk=artifact_pb2.Chunk(offset=offset, data=data, crc32c=checksum))
    rest, chunk = split_chunk(field, message.SerializeToString())
    assert (rest, chunk.offset, bytes(chunk.data), chunk.crc32c) == (b"", offset, data, checksum)
    assert chunk.intact == (crc32c(data) == checksum)


def test_the_other_fields_stay_a_message():
    poll = federation_pb2.PollTaskResponse(retry_after_seconds=2.5)
    poll.task.run_id = "run-1"
    rest = federation_pb2.WorkResponse(poll=poll).SerializeToString()
    message = chunk_message(RECEIVED_CHUNK, 0, DATA, rest)
    assert federation_pb2.WorkResponse.FromString(message).poll == poll
    found, chunk = split_chunk(RECEIVED_CHUNK, message)
    assert (found, bytes(chunk.data)) == (rest, DATA)
    assert split_chunk(RECEIVED_CHUNK, rest) == (rest, None)


def test_the_bytes_of_a_chunk_are_a_view_of_the_message():
    message = chunk_message(RECEIVED_CHUNK, 0, DATA)
    _, chunk = split_chunk(RECEIVED_CHUNK, message)
    assert chunk.data.obj is message


def test_every_cut_message_is_refused():
    message = chunk_message(SENT_CHUNK, 300, DATA[:9], b"")
    for end in range(1, len(message)):
        with pytest.raises(ProtocolError):
            split_chunk(SENT_CHUNK, message[:end])


def test_two_chunks_in_one_message_are_refused():
    with pytest.raises(ProtocolError, match="more than one"):
        split_chunk(SENT_CHUNK, 2 * chunk_message(SENT_CHUNK, 0, b"abc"))


@given(st.binary(max_size=60))
def test_junk_is_refused_or_is_a_message_for_protobuf_too(junk):
    try:
        rest, chunk = split_chunk(RECEIVED_CHUNK, junk)
    except ProtocolError:
        return
    try:
        parsed = federation_pb2.WorkResponse.FromString(junk)
    except DecodeError:
        with pytest.raises(
            DecodeError
        ):  # then it is another field that is wrong, and protobuf gets to see it
            federation_pb2.WorkResponse.FromString(rest)
        return
    if parsed.HasField("chunk"):
        assert chunk is not None
        assert (parsed.chunk.offset, parsed.chunk.data) == (chunk.offset, bytes(chunk.data))
