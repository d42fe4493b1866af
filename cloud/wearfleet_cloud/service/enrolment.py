"""Enrolment and renewal: a one-time code, or the present certificate, becomes a certificate."""

import datetime as dt
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection
from wearfleet_protos.errors import DeniedError
from wearfleet_protos.ticket import EnrolmentTicket
from wearfleet_protos.topics import check_name

from wearfleet_cloud.fleet.identity import Authority, IssuedCertificate, device_id_for, key_hash
from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.storage.audit import append_audit
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.device_records import (
    Code,
    Device,
    bind_code,
    bump_revision,
    find_code,
    find_device,
    insert_code,
    insert_device,
    note_certificate,
)

__all__ = ["CODE_HOURS", "Enrolled", "Enrolment", "make_ticket"]

CODE_HOURS: Final = 24.0
_REFUSED: Final = "the enrolment code is unknown, used or expired; get a new one with `devices enrol-code`"


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device and its fresh certificate."""

    device: Device
    certificate: IssuedCertificate


def make_ticket(
    database: Database,
    authority: Authority,
    address: str,
    *,
    name: str,
    tenant: str,
    now_ns: int,
    hours: float = CODE_HOURS,
) -> EnrolmentTicket:
    """Create a one-time code; only its hash is stored.

    Args:
        database: of the service.
        authority: its certificate travels in the ticket.
        address: ``host:port`` of the enrolment service.
        name: the device's name; its id gets four random digits after it.
        tenant: of the device.
        now_ns: present time.
        hours: the code can be used so long.

    Raises:
        ProtocolError: name or tenant is not a valid name.
    """
    check_name(name, "device name")
    check_name(tenant, "tenant")
    secret = secrets.token_urlsafe(24)
    code = Code(_hash(secret), tenant, name[:59], now_ns, now_ns + int(hours * 3600e9))
    with database.write() as connection:
        insert_code(connection, code)
        append_audit(connection, now_ns, "device.code", name)
    return EnrolmentTicket(address, secret, authority.ca_der)


class Enrolment:
    """Issues certificates.

    Args:
        database: codes and devices.
        authority: signs.
        directory: learns new devices at once.
    """

    def __init__(self, database: Database, authority: Authority, directory: Directory) -> None:
        self._database, self._authority, self._directory = database, authority, directory

    async def enrol(self, code: str, csr_der: bytes, agent_version: str) -> Enrolled:
        """Exchange a code for a certificate; a device whose answer was lost may repeat the call with the same key.

        Raises:
            DeniedError: the code is unknown, expired, or was used with another key.
            IntegrityError: the signing request is unusable.
        """
        key = key_hash(csr_der)
        enrolled = await self._database.run(
            lambda connection: self._redeem(connection, _hash(code), key, csr_der, agent_version)
        )
        self._directory.add(enrolled.device)
        return enrolled

    async def renew(self, device_id: str, csr_der: bytes) -> IssuedCertificate:
        """A fresh certificate for a device that has shown its present one.

        Raises:
            IntegrityError: the signing request is unusable.
        """
        device = self._directory.active(device_id)
        certificate = self._authority.issue(csr_der, device_id, device.tenant, dt.datetime.now(dt.UTC))

        def work(connection: Connection) -> None:
            note_certificate(connection, device_id, certificate.serial, certificate.expires_ns)
            append_audit(connection, time.time_ns(), "device.renew", device_id, certificate.serial)

        await self._database.run(work)
        return certificate

    def _redeem(
        self, connection: Connection, code_hash: str, key: str, csr_der: bytes, version: str
    ) -> Enrolled:
        now_ns = time.time_ns()
        code = find_code(connection, code_hash)
        if code is None or now_ns > code.expires_ns or code.key_hash not in (None, key):
            raise DeniedError(_REFUSED)
        device_id = code.device_id or device_id_for(code.name)
        certificate = self._authority.issue(csr_der, device_id, code.tenant, dt.datetime.now(dt.UTC))
        if code.device_id is None:
            device = Device(
                device_id, code.tenant, code.name, None, now_ns,
                certificate.serial, certificate.expires_ns, version[:64], now_ns,
            )  # fmt: skip
            insert_device(connection, device)
            bind_code(connection, code_hash, device_id, key)
        else:
            note_certificate(connection, device_id, certificate.serial, certificate.expires_ns)
            device = find_device(connection, device_id)
            if device.revoked_ns is not None:
                raise DeniedError(f"device {device_id} was revoked; ask the operator")
        bump_revision(connection)
        append_audit(connection, now_ns, "device.enrol", device_id, certificate.serial)
        return Enrolled(device, certificate)


def _hash(code: str) -> str:
    return hashlib.sha256(b"wearfleet-code\n" + code.encode()).hexdigest()
