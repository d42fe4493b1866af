"""The Ed25519 key that signs manifests and plans; apart from the keys of TLS."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.signing import key_id_of, sign, verify

from wearfleet_cloud.fleet.private_files import read_private, write_private

__all__ = ["SigningKeys"]


class SigningKeys:
    """The signing key in a folder; made on first use.

    Args:
        folder: holds ``signing.key`` with mode 0600.

    Raises:
        ConfigError: the folder cannot be used, or the key is damaged.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "signing.key"
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_private(path, pem)
        try:
            key = serialization.load_pem_private_key(read_private(path), None)
        except ValueError as error:
            raise ConfigError(
                f"the signing key {path} is damaged: {error}; restore it from a backup"
            ) from error
        assert isinstance(key, Ed25519PrivateKey)
        self._key = key

    @property
    def public_keys(self) -> dict[str, bytes]:
        """Raw public keys (32 bytes) by key id: what devices trust."""
        raw = self._key.public_key().public_bytes_raw()
        return {key_id_of(raw): raw}

    def sign(self, payload: bytes, media_type: str) -> bytes:
        """A signed document around ``payload``."""
        return sign(payload, self._key, media_type)

    def verify(self, document: bytes, media_type: str) -> bytes:
        """The payload of a document that this key signed.

        Raises:
            IntegrityError: changed, of another type, or signed by another key.
        """
        return verify(document, self.public_keys, media_type)
