"""Who this device is: a key made here, a certificate from the fleet's authority, and where the cloud is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from wearfleet_protos.errors import ConfigError, ConflictError, DataError, IntegrityError, NotFoundError
from wearfleet_protos.topics import check_name

from wearfleet_edge.state import StateDirectory, atomic_write, read_json, write_json

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from wearfleet_protos.secagg.identity import CertificateSigner, CertificateVerifier

__all__ = [
    "Broker",
    "Enrolment",
    "certificate_validity",
    "load_enrolment",
    "make_key",
    "make_signing_request",
    "needs_renewal",
    "require_not_enrolled",
    "require_valid_certificate",
    "save_certificate",
    "save_enrolment",
    "secure_identity",
]


@dataclass(frozen=True, slots=True)
class Broker:
    """Where telemetry goes."""

    host: str
    port: int
    tls: bool


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What a device learns when it enrols.

    Args:
        tenant: owner of the device.
        device_id: common name of its certificate.
        cloud_address: ``host:port`` of the services.
        broker: where telemetry goes.
        signing_keys: trusted raw Ed25519 public keys by key id.
    """

    tenant: str
    device_id: str
    cloud_address: str
    broker: Broker
    signing_keys: dict[str, bytes]

    def __post_init__(self) -> None:
        check_name(self.tenant, "tenant")
        check_name(self.device_id, "device_id")


def make_key(state: StateDirectory) -> None:
    """Make an EC P-256 key that only the owner can read; a key that is there already stays."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  slow to import
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    if state.key.exists():
        return
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    atomic_write(state.key, pem, mode=0o600)


def make_signing_request(state: StateDirectory, common_name: str) -> bytes:
    """PKCS #10 request, DER, signed with the device's key; the authority decides the final name."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415

    key = _private_key(state)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def save_enrolment(
    state: StateDirectory, enrolment: Enrolment, *, chain_pem: bytes, authority_der: bytes
) -> None:
    """Store identity; the last file written is the one that makes the device count as enrolled.

    Raises:
        ConflictError: the directory belongs to an enrolled device already.
        IntegrityError: the certificate does not belong to the key or to this device.
    """
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    require_not_enrolled(state)
    _check_certificate(state, chain_pem, enrolment.device_id)
    authority = x509.load_der_x509_certificate(authority_der).public_bytes(Encoding.PEM)
    atomic_write(state.authority, authority)
    atomic_write(state.certificate, chain_pem)
    write_json(
        state.enrolment,
        {
            "tenant": enrolment.tenant,
            "device_id": enrolment.device_id,
            "cloud_address": enrolment.cloud_address,
            "broker": {
                "host": enrolment.broker.host,
                "port": enrolment.broker.port,
                "tls": enrolment.broker.tls,
            },
            "signing_keys": {key_id: key.hex() for key_id, key in enrolment.signing_keys.items()},
        },
    )


def require_not_enrolled(state: StateDirectory) -> None:
    """Refuse to give a second identity to a directory.

    Raises:
        ConflictError: it has one.
    """
    if state.enrolment.exists():
        raise ConflictError(
            f"{state.root} belongs to device {load_enrolment(state).device_id!r} already; use another --state"
        )


def save_certificate(state: StateDirectory, chain_pem: bytes, device_id: str) -> None:
    """Replace the certificate by a renewed one for the same key.

    Raises:
        IntegrityError: it does not belong to the key or to this device; the old one stays.
    """
    _check_certificate(state, chain_pem, device_id)
    atomic_write(state.certificate, chain_pem)


def load_enrolment(state: StateDirectory) -> Enrolment:
    """Who this device is.

    Raises:
        NotFoundError: it is not enrolled.
        DataError: the file is damaged.
    """
    if not state.enrolment.exists():
        raise NotFoundError(
            f"{state.root} is not enrolled; run: wearfleet-edge enrol TICKET --state {state.root}"
        )
    row = read_json(state.enrolment)
    try:
        return Enrolment(
            tenant=str(row["tenant"]),
            device_id=str(row["device_id"]),
            cloud_address=str(row["cloud_address"]),
            broker=Broker(str(row["broker"]["host"]), int(row["broker"]["port"]), bool(row["broker"]["tls"])),
            signing_keys={str(k): bytes.fromhex(v) for k, v in row["signing_keys"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{state.enrolment}: damaged ({error!r}); enrol again") from error


def certificate_validity(state: StateDirectory) -> tuple[datetime, datetime]:
    """Start and end of the certificate's life, UTC.

    Raises:
        DataError: there is no readable certificate.
    """
    try:
        leaf = _leaf(state.certificate.read_bytes())
    except (OSError, IntegrityError) as error:
        raise DataError(f"{state.certificate}: not a readable certificate ({error}); enrol again") from error
    return leaf.not_valid_before_utc, leaf.not_valid_after_utc


def require_valid_certificate(state: StateDirectory, now: datetime) -> None:
    """Check the dates before talking to anyone, because a server's refusal says less.

    Raises:
        ConfigError: expired, or not yet valid by this device's clock.
    """
    begin, end = certificate_validity(state)
    if now > end:
        raise ConfigError(
            f"the device's certificate expired on {end:%Y-%m-%d %H:%M} UTC, now is "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC; check the clock, or enrol again with a fresh ticket"
        )
    if now < begin:
        raise ConfigError(
            f"the device's certificate is valid from {begin:%Y-%m-%d %H:%M} UTC, but this clock says "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC; set the clock"
        )


def needs_renewal(state: StateDirectory, now: datetime) -> bool:
    """True when at least half of the certificate's life is over."""
    begin, end = certificate_validity(state)
    return now >= begin + (end - begin) / 2


def secure_identity(state: StateDirectory) -> tuple[CertificateSigner, CertificateVerifier]:
    """What signs as this device in secure aggregation, and what checks the signatures of others.

    Raises:
        DataError: the device's key cannot be read.
        IntegrityError: a certificate cannot be read.
    """
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415
    from wearfleet_protos.secagg.identity import CertificateSigner, CertificateVerifier  # noqa: PLC0415

    leaf = _leaf(state.certificate.read_bytes())
    signer = CertificateSigner(_private_key(state), leaf.public_bytes(Encoding.DER))
    return signer, CertificateVerifier(_leaf(state.authority.read_bytes()), lambda: datetime.now(UTC))


def _private_key(state: StateDirectory) -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    try:
        key = serialization.load_pem_private_key(state.key.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise DataError(f"{state.key}: the device's key cannot be read ({error}); enrol again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{state.key}: expected an elliptic-curve key; enrol again")
    return key


def _leaf(chain_pem: bytes) -> x509.Certificate:
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.load_pem_x509_certificates(chain_pem)[0]
    except ValueError as error:
        raise IntegrityError(f"not a certificate chain: {error}") from error


def _check_certificate(state: StateDirectory, chain_pem: bytes, device_id: str) -> None:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    leaf = _leaf(chain_pem)
    names = [str(n.value) for n in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    if names != [device_id]:
        raise IntegrityError(f"expected a certificate for {device_id!r}, got one for {names}")
    key = serialization.load_pem_private_key(state.key.read_bytes(), password=None)
    if key.public_key() != leaf.public_key():
        raise IntegrityError("the certificate was made for another key than this device's")
