"""What the service knows by heart: who is enrolled, what the fleet should run, and how models call their classes."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from wearfleet_protos.errors import DeniedError
from wearfleet_protos.manifest import ModelManifest

from wearfleet_cloud.fleet.registry import Registry
from wearfleet_cloud.storage.catalog import PublishedModel, list_models
from wearfleet_cloud.storage.database import Database
from wearfleet_cloud.storage.device_records import Device, list_devices, read_revision

__all__ = ["Directory"]


class Directory:
    """A copy of the small tables, read again when their revision grows. Readable from every thread.

    Args:
        database: the truth.
        registry: manifests.
    """

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database, self._registry = database, registry
        self._revision = -1
        self._devices: dict[str, Device] = {}  # replaced, never changed
        self._manifests: Mapping[str, ModelManifest] = {}
        self.release: tuple[PublishedModel, int] | None = None

    @property
    def devices(self) -> Mapping[str, Device]:
        """Every device ever enrolled, by id."""
        return MappingProxyType(self._devices)

    @property
    def revoked(self) -> tuple[str, ...]:
        """Ids of the devices that are shut out."""
        return tuple(sorted(d.device_id for d in self._devices.values() if d.revoked_ns is not None))

    @property
    def outside_rounds(self) -> dict[str, str]:
        """Devices that take part in no federated round -> ``revoked`` or ``quarantined``."""
        return {
            device.device_id: "quarantined" if device.revoked_ns is None else "revoked"
            for device in self._devices.values()
            if device.revoked_ns is not None or device.quarantined_ns is not None
        }

    def active(self, device_id: str) -> Device:
        """An enrolled device that may take part.

        Raises:
            DeniedError: never enrolled here, or revoked.
        """
        device = self._devices.get(device_id)
        if device is None:
            raise DeniedError(f"device {device_id[:80]!r} is not enrolled here; enrol it again")
        if device.revoked_ns is not None:
            raise DeniedError(f"device {device_id} was revoked; ask the operator")
        return device

    def add(self, device: Device) -> None:
        """Know a device from now on."""
        self._devices = {**self._devices, device.device_id: device}

    def manifest_of(self, model_digest: str) -> ModelManifest | None:
        """The manifest of a published ONNX file."""
        return self._manifests.get(model_digest)

    def refresh(self) -> bool:
        """Read the tables again when something changed; True when it did.

        Raises:
            TransportError: the database is busy or away.
        """
        with self._database.read() as connection:
            revision = read_revision(connection)
            if revision == self._revision:
                return False
            known = list_devices(connection)
            published = list_models(connection)
        self._devices = {device.device_id: device for device in known}
        self._learn_models(published)
        self._revision = revision
        return True

    def _learn_models(self, published: Iterable[PublishedModel]) -> None:
        manifests = dict(self._manifests)
        for model in published:
            if model.model_digest not in manifests:
                manifests[model.model_digest] = self._registry.manifest(model.manifest_digest)
        self._manifests = manifests
        current = self._registry.current()
        self.release = None if current is None else (current[0], self._registry.document_size(current[0]))
