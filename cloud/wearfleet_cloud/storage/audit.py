"""The audit log: who was enrolled and revoked, what was published, which run was started. Append-only, hash-chained."""

import hashlib
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from wearfleet_protos.canonical import canonical_json
from wearfleet_protos.errors import IntegrityError

from wearfleet_cloud.storage.tables import audit, revision

__all__ = ["append_audit", "verify_audit"]

_START: Final = "0" * 64


def append_audit(connection: Connection, now_ns: int, action: str, subject: str, detail: str = "") -> None:
    """Add an entry in the transaction of what it tells about."""
    connection.execute(sa.select(revision.c.value).with_for_update())  # one writer of the chain at a time
    last = connection.execute(
        sa.select(audit.c.entry, audit.c.hash).order_by(audit.c.entry.desc()).limit(1)
    ).first()
    entry, previous = (0, _START) if last is None else (last.entry + 1, last.hash)
    row = {
        "entry": entry,
        "at_ns": now_ns,
        "action": action,
        "subject": subject[:200],
        "detail": detail[:500],
    }
    connection.execute(sa.insert(audit), row | {"hash": _hash(previous, row)})


def verify_audit(connection: Connection) -> int:
    """Check the whole chain; the number of entries.

    Raises:
        IntegrityError: an entry was changed, removed or put in.
    """
    previous = _START
    count = 0
    for row in connection.execute(sa.select(audit).order_by(audit.c.entry)).mappings():
        values = {name: row[name] for name in ("entry", "at_ns", "action", "subject", "detail")}
        if row["entry"] != count or row["hash"] != _hash(previous, values):
            raise IntegrityError(f"audit entry {count} was changed or is missing; compare with a backup")
        previous = row["hash"]
        count += 1
    return count


def _hash(previous: str, row: dict[str, object]) -> str:
    return hashlib.sha256(previous.encode() + canonical_json(row)).hexdigest()
