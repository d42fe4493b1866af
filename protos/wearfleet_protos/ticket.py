"""The enrolment ticket: address, one-time code and the certificate authority, in one string.

The ticket carries the authority's certificate, so a device never trusts a server on first use.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from wearfleet_protos.canonical import canonical_json, parse_json, take
from wearfleet_protos.errors import ProtocolError

__all__ = ["EnrolmentTicket"]

_PREFIX: Final = "wfe1."
_MAX_CHARACTERS: Final = 8192


@dataclass(frozen=True, slots=True)
class EnrolmentTicket:
    """What a device needs to enrol.

    Args:
        cloud_address: ``host:port`` of the enrolment service.
        code: one-time secret.
        ca_der: certificate of the authority, DER.
    """

    cloud_address: str
    code: str
    ca_der: bytes

    def encode(self) -> str:
        """One line of text, safe to copy, paste and put into a QR code."""
        body = {
            "cloud_address": self.cloud_address,
            "code": self.code,
            "ca_der": base64.b64encode(self.ca_der).decode(),
        }
        return _PREFIX + base64.urlsafe_b64encode(canonical_json(body)).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> EnrolmentTicket:
        """Parse :meth:`encode`.

        Raises:
            ProtocolError: not a ticket, or cut short while copying.
        """
        text = text.strip()
        if not text.startswith(_PREFIX) or len(text) > _MAX_CHARACTERS:
            raise ProtocolError(
                f"an enrolment ticket starts with {_PREFIX!r}; copy the whole line, got {text[:16]!r}"
            )
        body = text.removeprefix(_PREFIX)
        try:
            row = take(
                parse_json(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), "ticket"),
                EnrolmentTicket,
                "ticket",
            )
            return EnrolmentTicket(
                cloud_address=str(row["cloud_address"]),
                code=str(row["code"]),
                ca_der=base64.b64decode(row["ca_der"], validate=True),
            )
        except (binascii.Error, ValueError, TypeError) as error:
            raise ProtocolError(f"the enrolment ticket is damaged ({error}); copy it again") from error
