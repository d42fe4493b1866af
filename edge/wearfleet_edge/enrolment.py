"""Turn a ticket into an identity: key made here, certificate from the service that the ticket names."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from wearfleet_protos.ticket import EnrolmentTicket

from wearfleet_edge.identity import make_key, make_signing_request, require_not_enrolled, save_enrolment
from wearfleet_edge.transport.rpc import enrol

if TYPE_CHECKING:
    from wearfleet_edge.identity import Enrolment
    from wearfleet_edge.state import StateDirectory

__all__ = ["enrol_device"]


def enrol_device(state: StateDirectory, ticket_text: str) -> Enrolment:
    """Enrol the device that owns a state directory.

    Args:
        state: a directory without an identity.
        ticket_text: one line from ``wearfleet-cloud devices enrol-code``.

    Returns:
        Who the device is now.

    Raises:
        ProtocolError: the ticket is damaged.
        ConflictError: the directory has an identity already.
        DeniedError: the code is wrong, used or expired.
        TransportError: the service cannot be reached.
    """
    from cryptography import x509  # noqa: PLC0415  slow to import
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    ticket = EnrolmentTicket.decode(ticket_text)
    require_not_enrolled(state)
    state.create()
    make_key(state)
    enrolled = enrol(
        ticket.cloud_address,
        authority_pem=x509.load_der_x509_certificate(ticket.ca_der).public_bytes(Encoding.PEM),
        code=ticket.code,
        csr_der=make_signing_request(state, "device"),
        agent_version=version("wearfleet"),
    )
    save_enrolment(state, enrolled.enrolment, chain_pem=enrolled.chain_pem, authority_der=ticket.ca_der)
    return enrolled.enrolment
