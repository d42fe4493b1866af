"""Our own certificate authority: one root, one server certificate, one 30-day certificate for each device.

EC P-256 throughout. A device's certificate has CN = device id and O = tenant; both planes read the identity from it
and from nowhere else. Private keys of devices never come here: a device sends a signing request.
"""

import datetime as dt
import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from wearfleet_protos.errors import ConfigError, IntegrityError

from wearfleet_cloud.fleet.private_files import read_private, write_private

__all__ = [
    "DEVICE_DAYS",
    "SERVICE_NAME",
    "Authority",
    "IssuedCertificate",
    "ServerFiles",
    "device_id_for",
    "key_hash",
]

DEVICE_DAYS: Final = 30
SERVICE_NAME: Final = "wearfleet-service"
"""CN of the service itself; no device id can be equal, since those end in a hyphen and four hexadecimal digits."""

_ROOT_DAYS: Final = 3650
_SERVER_DAYS: Final = 397
_RENEW_DAYS: Final = 30
_SKEW: Final = dt.timedelta(minutes=10)  # devices with a clock that is behind
_MAX_CSR_BYTES: Final = 8192


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A device's certificate: chain in PEM (leaf first), serial in hexadecimal, end of validity."""

    chain_pem: bytes
    serial: str
    expires_ns: int


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """Paths of what TLS servers need, all in PEM."""

    certificate: Path
    key: Path
    ca: Path


def device_id_for(name: str) -> str:
    """A fresh device id: the name and four random hexadecimal digits."""
    return f"{name[:59].rstrip('-')}-{secrets.token_hex(2)}"


class Authority:
    """The certificate authority in a folder; made on first use.

    Args:
        folder: keys (mode 0600) and certificates.

    Raises:
        ConfigError: the folder cannot be used, or a file in it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        key_path, certificate_path = folder / "ca.key", folder / "ca.pem"
        if not key_path.exists():
            key, certificate = _make_root()
            write_private(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
            write_private(key_path, _key_pem(key))
        try:
            self._certificate = x509.load_pem_x509_certificate(read_private(certificate_path))
            loaded = serialization.load_pem_private_key(read_private(key_path), None)
        except ValueError as error:
            raise ConfigError(f"the certificate authority in {folder} is damaged: {error}") from error
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded

    @property
    def ca_der(self) -> bytes:
        """The root certificate, DER."""
        return self._certificate.public_bytes(serialization.Encoding.DER)

    @property
    def ca_pem(self) -> bytes:
        """The root certificate, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def server_files(self, hosts: tuple[str, ...], now: dt.datetime) -> ServerFiles:
        """Certificate and key of the service; made anew when hosts changed or a month is left.

        Args:
            hosts: names and addresses under which the service is reached, beside this machine's own.
            now: present time, UTC.
        """
        files = ServerFiles(self._folder / "server.pem", self._folder / "server.key", self._folder / "ca.pem")
        wanted = _alternative_names(hosts)
        if not _still_good(files, wanted, now):
            key = ec.generate_private_key(ec.SECP256R1())
            builder = self._builder(_name(SERVICE_NAME, "wearfleet"), key.public_key(), now, _SERVER_DAYS)
            builder = builder.add_extension(wanted, critical=False).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            certificate = builder.sign(self._key, hashes.SHA256())
            write_private(files.key, _key_pem(key))
            write_private(
                files.certificate, certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem
            )
        return files

    def issue(self, csr_der: bytes, device_id: str, tenant: str, now: dt.datetime) -> IssuedCertificate:
        """Certify a device's key; nothing but the key is taken from the request.

        Raises:
            IntegrityError: the request is not a PKCS #10 request with an EC P-256 key that signed it.
        """
        key = _requested_key(csr_der)
        builder = self._builder(_name(device_id, tenant), key, now, DEVICE_DAYS).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return IssuedCertificate(
            chain_pem=certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem,
            serial=f"{certificate.serial_number:x}",
            expires_ns=int(certificate.not_valid_after_utc.timestamp()) * 1_000_000_000,
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )


def key_hash(csr_der: bytes) -> str:
    """SHA-256 of the public key of a signing request, hexadecimal.

    Raises:
        IntegrityError: as for :meth:`Authority.issue`.
    """
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        _requested_key(csr_der).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def _requested_key(csr_der: bytes) -> ec.EllipticCurvePublicKey:
    try:
        if len(csr_der) > _MAX_CSR_BYTES:
            raise IntegrityError(
                f"signing request has {len(csr_der)} bytes, at most {_MAX_CSR_BYTES} are accepted"
            )
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"not a PKCS #10 signing request in DER: {error}") from error
    if (
        not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(key.curve, ec.SECP256R1)
        or not signed
    ):
        raise IntegrityError("the signing request must hold an EC P-256 key and be signed by it")
    return key


def _make_root() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    name = _name(f"wearfleet root {secrets.token_hex(4)}", "wearfleet")
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + dt.timedelta(days=_ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return key, builder.sign(key, hashes.SHA256())


def _name(common_name: str, organisation: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _alternative_names(hosts: tuple[str, ...]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in sorted({"localhost", "127.0.0.1", "::1", *hosts} - {"0.0.0.0", "::"}):  # noqa: S104 - left out here
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _still_good(files: ServerFiles, wanted: x509.SubjectAlternativeName, now: dt.datetime) -> bool:
    if not files.certificate.exists() or not files.key.exists():
        return False
    certificate = x509.load_pem_x509_certificate(read_private(files.certificate))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names == wanted and certificate.not_valid_after_utc - now > dt.timedelta(days=_RENEW_DAYS)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
