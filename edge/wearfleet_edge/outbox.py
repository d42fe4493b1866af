"""The outbox: what must reach the cloud waits here, on disk, until the broker acknowledges it.

Laws:

* A message and its sequence number are written in one transaction, so within (boot, kind) the numbers have no gaps.
* A row leaves only by acknowledgement, or by the policy *drop oldest*, which counts each row it drops.
* Rows that are under way (leased) are never dropped; after a restart everything unacknowledged is sent again, so
  a consumer may see a message twice and tells it by (device, boot, kind, sequence).

One commit is one write to the log without waiting for the disk: it survives ``kill -9`` of the agent; a power cut
may take the last moments but leaves a readable file.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from wearfleet_protos.errors import DataError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MakePayload", "Outbox", "OutboxRow", "OutboxSummary", "inspect_outbox"]

MakePayload = Callable[[int], bytes]
"""Encodes a message that carries the given sequence number."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, boot TEXT NOT NULL, sequence INTEGER NOT NULL,
    created_ns INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS sequences (
    boot TEXT, kind TEXT, next INTEGER NOT NULL, PRIMARY KEY (boot, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS losses (kind TEXT PRIMARY KEY, lost INTEGER NOT NULL) WITHOUT ROWID;
"""
_NEXT_SEQUENCE: Final = (
    "INSERT INTO sequences VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET next = next + 1 RETURNING next - 1"
)
_INSERT: Final = "INSERT INTO messages (kind, boot, sequence, created_ns, payload) VALUES (?, ?, ?, ?, ?)"
_LOST: Final = "INSERT INTO losses VALUES (?, 1) ON CONFLICT DO UPDATE SET lost = lost + 1"


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One waiting message."""

    row_id: int
    kind: str
    boot: str
    sequence: int
    created_ns: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class OutboxSummary:
    """Counts a kind since the outbox was made: appended = acknowledged + lost + waiting.

    ``oldest_ns`` is the wall-clock time of the oldest waiting message, 0 when there is none.
    """

    size_bytes: int
    oldest_ns: int
    appended: dict[str, int]
    waiting: dict[str, int]
    lost: dict[str, int]

    @property
    def depth(self) -> int:
        """Messages that wait."""
        return sum(self.waiting.values())

    def acknowledged(self, kind: str) -> int:
        """Messages of a kind that the broker has confirmed."""
        return self.appended.get(kind, 0) - self.waiting.get(kind, 0) - self.lost.get(kind, 0)


class Outbox:
    """Durable queue of one agent; safe to use from several threads.

    Args:
        path: database file.
        boot: random identity of this start; new rows carry it.
        clock_ns: wall clock.
        max_messages: most waiting rows.
        max_bytes: most waiting payload bytes.

    Raises:
        DataError: the file is not a usable database.
    """

    def __init__(
        self, path: Path, *, boot: str, clock_ns: Callable[[], int], max_messages: int, max_bytes: int
    ) -> None:
        self._boot = boot
        self._clock_ns = clock_ns
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._leased: set[int] = set()
        self._cursor = 0  # rows up to here have been leased since the last release
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA cache_size = -512")
            self._db.executescript(_SCHEMA)
            self._waiting, self._size_bytes = _measure(self._db)
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{path}: not a usable outbox ({error}); move it away to start an empty one"
            ) from error

    @property
    def depth(self) -> int:
        """Messages that wait, those under way included."""
        return sum(self._waiting.values())

    def append(self, entries: Sequence[tuple[str, MakePayload]]) -> None:
        """Write messages in one transaction, then drop the oldest waiting ones while a limit is passed.

        Args:
            entries: kind, and the function that encodes the message with its sequence number.

        Raises:
            DataError: the disk refused; nothing was written.
        """
        with self._transaction():
            for kind, make in entries:
                sequence = self._db.execute(_NEXT_SEQUENCE, (self._boot, kind)).fetchone()[0]
                payload = make(sequence)
                self._db.execute(_INSERT, (kind, self._boot, sequence, self._clock_ns(), payload))
                self._waiting[kind] = self._waiting.get(kind, 0) + 1
                self._size_bytes += len(payload)
            if self.depth > self._max_messages or self._size_bytes > self._max_bytes:
                self._drop_oldest()

    def lease(self, limit: int) -> list[OutboxRow]:
        """The next messages to send, oldest first; each is handed out once until :meth:`release_all`.

        Args:
            limit: most rows; may be 0 or less.
        """
        if limit < 1:
            return []
        with self._changed:
            rows = [
                OutboxRow(*row)
                for row in self._db.execute(
                    "SELECT id, kind, boot, sequence, created_ns, payload FROM messages WHERE id > ? "
                    "ORDER BY id LIMIT ?",
                    (self._cursor, limit),
                )
            ]
            self._leased.update(row.row_id for row in rows)
            self._cursor = rows[-1].row_id if rows else self._cursor
            return rows

    def acknowledge(self, row_ids: Iterable[int]) -> None:
        """Delete messages that the broker has confirmed."""
        self._settle(row_ids, lost=False)

    def discard(self, row_ids: Iterable[int]) -> None:
        """Delete messages that the broker will never accept; they count as lost."""
        self._settle(row_ids, lost=True)

    def release_all(self) -> None:
        """The connection is gone: everything unacknowledged is to be sent again, oldest first."""
        with self._changed:
            self._leased.clear()
            self._cursor = 0

    def wait_for_work(self, timeout_s: float) -> bool:
        """Wait until a message is there that was not leased yet, or the time is over; True when there is one."""
        with self._changed:
            return self._changed.wait_for(self._has_work, timeout_s)

    def wait_below(self, depth: int, timeout_s: float) -> bool:
        """Wait until fewer than ``depth`` messages wait; True when so."""
        with self._changed:
            return self._changed.wait_for(lambda: self.depth < depth, timeout_s)

    def summary(self) -> OutboxSummary:
        """Counts and sizes; cheap however much waits."""
        with self._changed:
            return _summarise(self._db, dict(self._waiting), self._size_bytes)

    def lost(self) -> int:
        """Messages dropped or discarded since the outbox was made."""
        with self._changed:
            return int(self._db.execute("SELECT COALESCE(SUM(lost), 0) FROM losses").fetchone()[0])

    def close(self) -> None:
        """Fold the log into the database file and close it."""
        with self._changed:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    def _has_work(self) -> bool:
        return self.depth > len(self._leased)

    def _settle(self, row_ids: Iterable[int], *, lost: bool) -> None:
        with self._transaction():
            for row_id in row_ids:
                self._delete(row_id, lost=lost)
                self._leased.discard(row_id)

    def _drop_oldest(self) -> None:
        """Drop waiting rows, oldest first, until both limits hold; rows under way stay."""
        waiting = self._db.execute("SELECT id FROM messages ORDER BY id")
        doomed: list[int] = []
        depth, size = self.depth, self._size_bytes
        while depth > self._max_messages or size > self._max_bytes:
            row = waiting.fetchone()
            if row is None:
                break
            if row[0] not in self._leased:
                doomed.append(row[0])
                depth -= 1
                size -= self._payload_bytes(row[0])
        waiting.close()
        for row_id in doomed:
            self._delete(row_id, lost=True)

    def _payload_bytes(self, row_id: int) -> int:
        return int(
            self._db.execute("SELECT LENGTH(payload) FROM messages WHERE id = ?", (row_id,)).fetchone()[0]
        )

    def _delete(self, row_id: int, *, lost: bool) -> None:
        row = self._db.execute(
            "DELETE FROM messages WHERE id = ? RETURNING kind, LENGTH(payload)", (row_id,)
        ).fetchone()
        if row is None:
            return
        self._waiting[row[0]] -= 1
        self._size_bytes -= row[1]
        if lost:
            self._db.execute(_LOST, (row[0],))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._changed:
            before = dict(self._waiting), self._size_bytes
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                self._waiting, self._size_bytes = before
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise DataError(
                        f"the outbox cannot be written ({error}); check the disk's free space"
                    ) from error
                raise
            self._changed.notify_all()


def inspect_outbox(path: Path) -> OutboxSummary:
    """Look into an outbox without changing it, also while its agent runs.

    Raises:
        NotFoundError: there is no such file.
        DataError: the file is not an outbox.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no outbox; the agent has not run with this state directory yet")
    try:
        db = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10.0
        )
        try:
            db.execute("BEGIN")  # one snapshot for all questions
            return _summarise(db, *_measure(db))
        finally:
            db.close()
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path}: not a readable outbox ({error})") from error


def _measure(db: sqlite3.Connection) -> tuple[dict[str, int], int]:
    """Waiting messages a kind, and their payload bytes."""
    rows = db.execute("SELECT kind, COUNT(*), SUM(LENGTH(payload)) FROM messages GROUP BY kind").fetchall()
    return {kind: count for kind, count, _ in rows}, sum(size for _, _, size in rows)


def _summarise(db: sqlite3.Connection, waiting: dict[str, int], size_bytes: int) -> OutboxSummary:
    oldest = db.execute("SELECT created_ns FROM messages ORDER BY id LIMIT 1").fetchone()
    return OutboxSummary(
        size_bytes=size_bytes,
        oldest_ns=oldest[0] if oldest else 0,
        appended=dict(db.execute("SELECT kind, SUM(next) FROM sequences GROUP BY kind").fetchall()),
        waiting=waiting,
        lost=dict(db.execute("SELECT kind, lost FROM losses").fetchall()),
    )
