"""Queries about devices and enrolment codes. Each takes the connection of the caller's transaction."""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from wearfleet_protos.errors import NotFoundError

from wearfleet_cloud.storage.tables import device_health, devices, enrolment_codes, revision, streams

__all__ = [
    "Code",
    "Device",
    "StreamCount",
    "bind_code",
    "bump_revision",
    "find_code",
    "find_device",
    "health_of",
    "insert_code",
    "insert_device",
    "list_devices",
    "note_certificate",
    "note_reported",
    "note_seen",
    "quarantine_device",
    "read_revision",
    "release_device",
    "revoke_device",
    "stream_counts",
]

_LONGEST_REASON: Final = 500


@dataclass(frozen=True, slots=True)
class Device:
    """One enrolled device.

    ``revoked_ns`` is None while it may connect, ``quarantined_ns`` while it may take part in federated rounds.
    """

    device_id: str
    tenant: str
    name: str
    revoked_ns: int | None
    enrolled_ns: int
    certificate_serial: str
    certificate_expires_ns: int
    agent_version: str
    last_seen_ns: int
    manifest_digest: str = ""
    model_version: int = 0
    personalised: bool = False
    refusal: str = ""
    quarantined_ns: int | None = None
    quarantine_reason: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """One enrolment code, known by the hash of its secret."""

    code_hash: str
    tenant: str
    name: str
    created_ns: int
    expires_ns: int
    device_id: str | None = None
    key_hash: str | None = None


@dataclass(frozen=True, slots=True)
class StreamCount:
    """What came of one kind of message since one start of an agent; ``lost`` are gaps in the numbers so far."""

    device_id: str
    boot_id: str
    kind: str
    received: int
    duplicated: int
    highest_sequence: int

    @property
    def lost(self) -> int:
        """Numbers below the highest that never came."""
        return self.highest_sequence + 1 - self.received


def bump_revision(connection: Connection) -> None:
    """Tell a running service that something it must notice has changed."""
    connection.execute(sa.update(revision).values(value=revision.c.value + 1))


def read_revision(connection: Connection) -> int:
    """Grows with every :func:`bump_revision`."""
    return int(connection.execute(sa.select(revision.c.value)).scalar_one())


def insert_code(connection: Connection, code: Code) -> None:
    """Store a new code."""
    connection.execute(sa.insert(enrolment_codes), _values(code))


def find_code(connection: Connection, code_hash: str) -> Code | None:
    """The code with this hash; locked against use by others until the transaction ends."""
    query = sa.select(enrolment_codes).where(enrolment_codes.c.code_hash == code_hash).with_for_update()
    row = connection.execute(query).mappings().first()
    return None if row is None else Code(**row)


def bind_code(connection: Connection, code_hash: str, device_id: str, key_hash: str) -> None:
    """Note that a code was used, by whom and for which key."""
    connection.execute(
        sa.update(enrolment_codes)
        .where(enrolment_codes.c.code_hash == code_hash)
        .values(device_id=device_id, key_hash=key_hash)
    )


def insert_device(connection: Connection, device: Device) -> None:
    """Store a new device."""
    connection.execute(sa.insert(devices), _values(device))


def find_device(connection: Connection, device_id: str) -> Device:
    """One device.

    Raises:
        NotFoundError: no device has this id.
    """
    row = connection.execute(sa.select(devices).where(devices.c.device_id == device_id)).mappings().first()
    if row is None:
        raise NotFoundError(f"no device {device_id!r}; `wearfleet-cloud devices list` shows all")
    return Device(**row)


def list_devices(connection: Connection) -> list[Device]:
    """All devices by id."""
    rows = connection.execute(sa.select(devices).order_by(devices.c.device_id)).mappings()
    return [Device(**row) for row in rows]


def revoke_device(connection: Connection, device_id: str, now_ns: int) -> Device:
    """Shut a device out for good; doing it again changes nothing.

    Raises:
        NotFoundError: no device has this id.
    """
    find_device(connection, device_id)
    connection.execute(
        sa.update(devices)
        .where(devices.c.device_id == device_id, devices.c.revoked_ns.is_(None))
        .values(revoked_ns=now_ns)
    )
    bump_revision(connection)
    return find_device(connection, device_id)


def quarantine_device(connection: Connection, device_id: str, now_ns: int, reason: str) -> Device:
    """Leave a device out of federated rounds until it is released; the newest reason stays.

    Raises:
        NotFoundError: no device has this id.
    """
    return _quarantined(connection, device_id, now_ns, reason[:_LONGEST_REASON])


def release_device(connection: Connection, device_id: str) -> Device:
    """End a quarantine; nothing changes where there is none.

    Raises:
        NotFoundError: no device has this id.
    """
    return _quarantined(connection, device_id, None, "")


def _quarantined(connection: Connection, device_id: str, since_ns: int | None, reason: str) -> Device:
    find_device(connection, device_id)
    _update(connection, device_id, quarantined_ns=since_ns, quarantine_reason=reason)
    bump_revision(connection)
    return find_device(connection, device_id)


def note_certificate(connection: Connection, device_id: str, serial: str, expires_ns: int) -> None:
    """Note a fresh certificate."""
    _update(connection, device_id, certificate_serial=serial, certificate_expires_ns=expires_ns)


def note_seen(connection: Connection, device_id: str, now_ns: int) -> None:
    """Note a sign of life."""
    _update(connection, device_id, last_seen_ns=now_ns)


def note_reported(
    connection: Connection,
    device_id: str,
    now_ns: int,
    *,
    agent_version: str,
    manifest_digest: str,
    model_version: int,
    personalised: bool,
    refusal: str,
) -> None:
    """Note what a device says it runs."""
    _update(
        connection,
        device_id,
        last_seen_ns=now_ns,
        agent_version=agent_version[:64],
        manifest_digest=manifest_digest[:80],
        model_version=min(model_version, 2**31 - 1),
        personalised=personalised,
        refusal=refusal[:500],
    )


def stream_counts(connection: Connection, device_id: str | None = None) -> list[StreamCount]:
    """Counts of every stream, of one device or of all."""
    columns = [streams.c[name] for name in StreamCount.__dataclass_fields__]
    query = sa.select(*columns).order_by(streams.c.stream_id)
    if device_id is not None:
        query = query.where(streams.c.device_id == device_id)
    return [StreamCount(**row) for row in connection.execute(query).mappings()]


def health_of(connection: Connection, device_id: str) -> dict[str, object]:
    """The newest health report of a device; empty when there is none."""
    query = sa.select(device_health).where(device_health.c.device_id == device_id)
    row = connection.execute(query).mappings().first()
    return {} if row is None else dict(row)


def _update(connection: Connection, device_id: str, **values: object) -> None:
    connection.execute(sa.update(devices).where(devices.c.device_id == device_id).values(**values))


def _values(record: Device | Code) -> dict[str, object]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}
