"""Queries about artifacts, published models and the release that every device should run."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from wearfleet_protos.errors import ConflictError, NotFoundError
from wearfleet_protos.tensors import Digest

from wearfleet_cloud.storage.database import insert_or_skip
from wearfleet_cloud.storage.device_records import bump_revision
from wearfleet_cloud.storage.tables import artifacts, models, releases

__all__ = [
    "PublishedModel",
    "artifact_size",
    "current_release",
    "find_model",
    "insert_artifact",
    "insert_model",
    "list_models",
    "release_model",
]


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One published version of a model line."""

    model_id: str
    version: int
    manifest_digest: Digest
    model_digest: Digest
    published_ns: int


def insert_artifact(
    connection: Connection, digest: Digest, size_bytes: int, media_type: str, now_ns: int
) -> None:
    """Note an artifact that the blob store holds; an old one stays as it is."""
    row = {"digest": digest, "size_bytes": size_bytes, "media_type": media_type, "created_ns": now_ns}
    insert_or_skip(connection, artifacts, row)


def artifact_size(connection: Connection, digest: Digest) -> int:
    """Bytes of an artifact.

    Raises:
        NotFoundError: no such artifact.
    """
    size = connection.execute(sa.select(artifacts.c.size_bytes).where(artifacts.c.digest == digest)).scalar()
    if size is None:
        raise NotFoundError(f"no artifact {digest}")
    return int(size)


def insert_model(connection: Connection, model: PublishedModel) -> None:
    """Store a new version.

    Raises:
        ConflictError: the line has this version or a higher one already.
    """
    newest = connection.execute(
        sa.select(sa.func.max(models.c.version)).where(models.c.model_id == model.model_id)
    ).scalar()
    if newest is not None and newest >= model.version:
        raise ConflictError(
            f"model {model.model_id} is at version {newest}; a new release needs a higher one, got {model.version}"
        )
    connection.execute(
        sa.insert(models), {name: getattr(model, name) for name in PublishedModel.__dataclass_fields__}
    )


def release_model(connection: Connection, model_id: str, version: int, now_ns: int) -> None:
    """Make a published version the one that every device should run."""
    connection.execute(sa.insert(releases), {"model_id": model_id, "version": version, "released_ns": now_ns})
    bump_revision(connection)


def current_release(connection: Connection) -> PublishedModel | None:
    """What every device should run; None before the first release."""
    query = (
        sa.select(models)
        .join(releases, (releases.c.model_id == models.c.model_id) & (releases.c.version == models.c.version))
        .order_by(releases.c.release_id.desc())
        .limit(1)
    )
    row = connection.execute(query).mappings().first()
    return None if row is None else PublishedModel(**row)


def find_model(connection: Connection, model_id: str, version: int | None = None) -> PublishedModel:
    """One version of a line, the newest when none is named.

    Raises:
        NotFoundError: nothing was published under this name and version.
    """
    query = sa.select(models).where(models.c.model_id == model_id).order_by(models.c.version.desc()).limit(1)
    if version is not None:
        query = query.where(models.c.version == version)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFoundError(f"no model {model_id!r} with version {version or 'any'}")
    return PublishedModel(**row)


def list_models(connection: Connection) -> list[PublishedModel]:
    """Everything published, by line and version."""
    query = sa.select(models).order_by(models.c.model_id, models.c.version)
    return [PublishedModel(**row) for row in connection.execute(query).mappings()]
