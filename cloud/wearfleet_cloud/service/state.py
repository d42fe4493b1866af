"""What a service and its command lines share: database, artifacts, keys, and what follows from them."""

from dataclasses import dataclass

from wearfleet_cloud.config import Settings
from wearfleet_cloud.fleet.identity import Authority
from wearfleet_cloud.fleet.registry import Registry
from wearfleet_cloud.fleet.signing import SigningKeys
from wearfleet_cloud.service.directory import Directory
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.database import Database

__all__ = ["State", "open_state"]


@dataclass(frozen=True, slots=True)
class State:
    """Everything that lies in the state folder (the database may lie elsewhere)."""

    database: Database
    blobs: Blobs
    authority: Authority
    keys: SigningKeys
    registry: Registry
    directory: Directory


def open_state(settings: Settings) -> State:
    """Open the state of a service, making what is missing; close ``database`` in the end.

    Raises:
        ConfigError: something cannot be opened; says what to do.
    """
    service = settings.service
    database = Database(settings.database.url)
    folder = service.state_dir / "keys"
    authority, keys = Authority(folder), SigningKeys(folder)
    blobs = Blobs(service.state_dir / "artifacts")
    registry = Registry(database, blobs, keys)
    return State(database, blobs, authority, keys, registry, Directory(database, registry))
