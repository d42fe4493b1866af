"""Downloading against a small HTTP server on loopback that can break off, ignore ranges, lie and refuse."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from wearfleet_cloud.data.dataset import Download
from wearfleet_cloud.data.download import fetch
from wearfleet_protos.errors import ConfigError, IntegrityError, TransportError

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does, and what it was asked."""

    address: str = ""
    break_after: int | None = None
    ignore_ranges: bool = False
    status: int = 200
    tell_length: bool = True
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if state.status != 200:
                self.send_error(state.status)
                return
            begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not state.ignore_ranges else 0
            if begin >= len(CONTENT):
                self.send_error(416)
                return
            body = CONTENT[begin:]
            self.send_response(206 if begin else 200)
            if state.tell_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="download-site")
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}/set.zip"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def wanted(site: Site) -> Download:
    return Download(site.address, "set.zip", SHA256, len(CONTENT))


def test_a_download_is_verified_and_named(site: Site, tmp_path: Path) -> None:
    told: list[int] = []
    path, digest = fetch(wanted(site), tmp_path / "set", lambda what, done, total: told.append(done))
    assert path.read_bytes() == CONTENT
    assert digest == SHA256
    assert told[-1] == len(CONTENT)
    assert [p.name for p in path.parent.iterdir()] == ["set.zip"]


def test_a_broken_download_is_retryable_and_continues_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.break_after = 100_000
    with pytest.raises(TransportError, match="broke off after 100000") as caught:
        fetch(wanted(site), tmp_path)
    assert caught.value.retryable
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip.part"]
    site.break_after = None
    path, _ = fetch(wanted(site), tmp_path)
    assert path.read_bytes() == CONTENT
    assert site.ranges == [None, "bytes=100000-"]


def test_a_server_without_ranges_is_read_from_the_start(site: Site, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:5000])
    site.ignore_ranges = True
    assert fetch(wanted(site), tmp_path)[0].read_bytes() == CONTENT


def test_a_complete_part_only_needs_its_name(site: Site, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(CONTENT)
    assert fetch(wanted(site), tmp_path)[0].read_bytes() == CONTENT


def test_a_file_that_is_there_is_verified_without_the_network(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(CONTENT)
    nowhere = Download("http://127.0.0.1:9/set.zip", "set.zip", SHA256, 10)
    assert fetch(nowhere, tmp_path) == (tmp_path / "set.zip", SHA256)


def test_other_bytes_than_published_are_removed(site: Site, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="expected sha256 0000"):
        fetch(replace(wanted(site), sha256="0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tell_length", [True, False])
def test_more_bytes_than_allowed_are_refused(site: Site, tmp_path: Path, tell_length: bool) -> None:
    site.tell_length = tell_length
    with pytest.raises(IntegrityError, match="at most 1000 bytes"):
        fetch(replace(wanted(site), max_bytes=1000), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "retryable"), [(404, False), (403, False), (503, True)])
def test_a_refusal_tells_whether_to_try_again(
    site: Site, tmp_path: Path, status: int, retryable: bool
) -> None:
    site.status = status
    with pytest.raises(TransportError, match=str(status)) as caught:
        fetch(wanted(site), tmp_path)
    assert caught.value.retryable is retryable


def test_no_network_is_a_transport_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"by hand at .*set\.zip"):
        fetch(Download("http://127.0.0.1:9/set.zip", "set.zip", "", 10), tmp_path)


def test_only_http_addresses_are_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="http"):
        fetch(Download("file:///etc/passwd", "set.zip", "", 10), tmp_path)
