"""Nothing leaves the outbox but by acknowledgement or a counted drop; no sequence number is lost or used twice."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wearfleet_edge.outbox import Outbox, inspect_outbox
from wearfleet_protos.errors import DataError, NotFoundError


def _open(path, boot="00000001", max_messages=1000, max_bytes=1 << 20):
    return Outbox(path, boot=boot, clock_ns=time.time_ns, max_messages=max_messages, max_bytes=max_bytes)


def _number(sequence):
    return f"message {sequence}".encode()


def test_messages_come_out_in_order_each_once(tmp_path):
    outbox = _open(tmp_path / "o")
    for _ in range(5):
        outbox.append([("a", _number), ("b", _number)])
    rows = outbox.lease(3) + outbox.lease(100)
    assert [(r.kind, r.sequence, r.payload) for r in rows] == [
        (k, i, _number(i)) for i in range(5) for k in "ab"
    ]
    assert outbox.lease(100) == []
    outbox.acknowledge([r.row_id for r in rows])
    assert outbox.depth == 0
    assert outbox.summary().acknowledged("a") == 5


def test_what_was_not_acknowledged_is_leased_again_after_a_release(tmp_path):
    outbox = _open(tmp_path / "o")
    for _ in range(4):
        outbox.append([("a", _number)])
    rows = outbox.lease(3)
    outbox.acknowledge([rows[1].row_id])
    outbox.release_all()
    assert [r.sequence for r in outbox.lease(10)] == [0, 2, 3]


def test_sequence_goes_on_after_a_restart_with_the_same_boot_and_begins_anew_with_another(tmp_path):
    for boot in ("00000001", "00000001", "00000002"):
        outbox = _open(tmp_path / "o", boot)
        outbox.append([("a", _number)])
        outbox.append([("a", _number)])
        outbox.close()
    rows = _open(tmp_path / "o", "00000003").lease(10)
    assert [(r.boot, r.sequence) for r in rows] == [("00000001", i) for i in range(4)] + [
        ("00000002", i) for i in range(2)
    ]


def test_a_message_that_cannot_be_encoded_uses_no_number_and_leaves_no_trace(tmp_path):
    outbox = _open(tmp_path / "o")

    def fail(_sequence):
        raise ValueError("cannot")

    with pytest.raises(ValueError, match="cannot"):
        outbox.append([("a", _number), ("b", fail)])
    assert outbox.depth == 0
    outbox.append([("a", _number)])
    assert outbox.lease(10)[0].sequence == 0


def test_above_the_limit_the_oldest_are_dropped_and_counted(tmp_path):
    outbox = _open(tmp_path / "o", max_messages=3)
    for _ in range(10):
        outbox.append([("a", _number)])
    assert [r.sequence for r in outbox.lease(10)] == [7, 8, 9]
    assert outbox.lost() == 7
    outbox.close()
    assert inspect_outbox(tmp_path / "o").lost == {"a": 7}


def test_the_byte_limit_drops_too(tmp_path):
    outbox = _open(tmp_path / "o", max_bytes=250)
    for _ in range(4):
        outbox.append([("a", lambda _: bytes(100))])
    assert outbox.depth == 2
    assert outbox.lost() == 2


def test_messages_under_way_are_never_dropped(tmp_path):
    outbox = _open(tmp_path / "o", max_messages=3)
    for _ in range(3):
        outbox.append([("a", _number)])
    under_way = outbox.lease(2)
    for _ in range(5):
        outbox.append([("a", _number)])
    outbox.acknowledge([r.row_id for r in under_way])
    outbox.release_all()
    assert [r.sequence for r in outbox.lease(10)] == [7]
    summary = outbox.summary()
    assert summary.lost == {"a": 5}
    assert summary.acknowledged("a") == 2


def test_discarded_messages_count_as_lost(tmp_path):
    outbox = _open(tmp_path / "o")
    outbox.append([("a", _number)])
    outbox.discard([outbox.lease(1)[0].row_id])
    assert outbox.depth == 0
    assert outbox.lost() == 1


def test_acknowledging_twice_counts_once(tmp_path):
    outbox = _open(tmp_path / "o")
    outbox.append([("a", _number)])
    row = outbox.lease(1)[0]
    outbox.acknowledge([row.row_id])
    outbox.acknowledge([row.row_id])
    assert outbox.depth == 0
    assert outbox.summary().acknowledged("a") == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["append", "lease", "ack", "release", "reopen"]), max_size=60))
def test_appended_is_always_acknowledged_plus_lost_plus_waiting(tmp_path, actions):
    path = tmp_path / os.urandom(4).hex()
    outbox, appended, acknowledged, leased = _open(path, max_messages=5), 0, 0, []
    for action in actions:
        if action == "append":
            outbox.append([("a", _number)])
            appended += 1
        elif action == "lease":
            leased += outbox.lease(2)
        elif action == "ack" and leased:
            outbox.acknowledge([leased.pop(0).row_id])
            acknowledged += 1
        elif action == "release":
            outbox.release_all()
            leased = []
        elif action == "reopen":
            outbox.close()
            outbox, leased = _open(path, max_messages=5), []
        summary = outbox.summary()
        assert summary.appended.get("a", 0) == appended
        assert summary.acknowledged("a") == acknowledged
        assert summary.depth == outbox.depth == appended - acknowledged - outbox.lost()
    outbox.close()
    assert inspect_outbox(path).depth == appended - acknowledged - sum(inspect_outbox(path).lost.values())


def test_waiting_reader_wakes_when_a_message_arrives(tmp_path):
    outbox = _open(tmp_path / "o")
    assert not outbox.wait_for_work(0.0)
    thread = threading.Timer(0.05, lambda: outbox.append([("a", _number)]))
    thread.start()
    begin = time.monotonic()
    assert outbox.wait_for_work(100.0)
    assert time.monotonic() - begin < 100.0, "it was woken"
    outbox.lease(1)
    assert not outbox.wait_for_work(0.0)
    thread.join()


def test_another_process_can_look_while_the_outbox_is_open(tmp_path):
    outbox = _open(tmp_path / "o")
    outbox.append([("a", _number)])
    assert inspect_outbox(tmp_path / "o").waiting == {"a": 1}
    assert inspect_outbox(tmp_path / "o").oldest_ns > 0


def test_missing_and_damaged_files_are_clear_errors(tmp_path):
    with pytest.raises(NotFoundError, match="has not run"):
        inspect_outbox(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match="outbox"):
        inspect_outbox(tmp_path / "junk")
    with pytest.raises(DataError, match="move it away"):
        _open(tmp_path / "junk")


def test_a_disk_that_refuses_is_a_data_error_and_the_numbers_stay_right(tmp_path):
    outbox = _open(tmp_path / "o")
    outbox.append([("a", _number)])
    outbox._db.execute("PRAGMA max_page_count = 1")

    def fill():
        for _ in range(100):
            outbox.append([("a", lambda _: bytes(5000))])

    with pytest.raises(DataError, match="free space"):
        fill()
    depth = outbox.depth
    outbox._db.execute("PRAGMA max_page_count = 100000")
    outbox.append([("a", _number)])
    rows = outbox.lease(1000)
    assert [r.sequence for r in rows] == list(range(depth + 1))


WRITER = """
import sys, time
from pathlib import Path
from wearfleet_edge.outbox import Outbox
boot = sys.argv[2]
outbox = Outbox(Path(sys.argv[1]), boot=boot, clock_ns=time.time_ns, max_messages=10**6, max_bytes=1 << 30)
while True:
    number = []
    outbox.append([("a", lambda n: number.append(n) or str(n).encode()), ("b", lambda n: str(n).encode())])
    print(number[0], flush=True)
    if number[0] % 3 == 2:
        outbox.acknowledge([r.row_id for r in outbox.lease(1)])
"""


def test_kill_in_the_middle_of_writing_loses_nothing_and_repeats_nothing(tmp_path):
    path = tmp_path / "o"
    for attempt in range(3):
        boot = f"0000000{attempt}"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), boot], stdout=subprocess.PIPE, text=True
        )
        promised = -1
        for line in writer.stdout:
            promised = int(line)
            if promised >= 40 + 7 * attempt:
                break
        writer.send_signal(signal.SIGKILL)
        promised = max([promised, *(int(rest) for rest in writer.stdout.read().split() if rest.isdigit())])
        writer.wait()
        writer.stdout.close()
        summary = inspect_outbox(path)
        database = sqlite3.connect(path)
        rows = database.execute(
            "SELECT kind, sequence, payload FROM messages WHERE boot = ? ORDER BY id", (boot,)
        )
        by_kind = {"a": [], "b": []}
        found = rows.fetchall()
        database.close()
        for kind, sequence, payload in found:
            assert payload == str(sequence).encode()
            by_kind[kind].append(sequence)
        appended = {"a": by_kind["a"][-1] + 1, "b": by_kind["b"][-1] + 1}
        assert (
            appended["a"] == appended["b"] >= promised + 1
        )  # both of a pair or none; what was promised is there
        for sequences in by_kind.values():
            assert sequences == sorted(set(sequences))
        assert summary.lost == {}
        assert sum(summary.waiting.values()) + summary.acknowledged("a") + summary.acknowledged("b") == sum(
            summary.appended.values()
        )
