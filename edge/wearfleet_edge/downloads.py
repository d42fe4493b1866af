"""The tensors of a task: made from what is held here and a small download, or downloaded whole.

What was made counts only if it has the task's digest, to the bit. Whatever is wrong with a difference, or with the copy
that it begins at, the whole tensors come instead.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Final

from wearfleet_protos.codecs import frozen_bytes
from wearfleet_protos.errors import IntegrityError, NotFoundError, ShapeError
from wearfleet_protos.tensors import check_finite, decode_tensors, digest_of, encode_tensors

from wearfleet_edge.state import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_protos.plan import Plan

    from wearfleet_edge.artifacts import ArtifactStore
    from wearfleet_edge.trainer import Tensors
    from wearfleet_edge.transport.cloud import Task

__all__ = ["Downloads", "HeldTensors"]

_LOG = logging.getLogger(__name__)

_KEPT: Final = 4


class HeldTensors:
    """Tensors of earlier tasks: the newest version of a run, and frozen ones, which several runs may have in common.

    Args:
        folder: where they lie; of each kind the last four are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._versions, self._frozen = folder / "versions", folder / "frozen"
        self._known: dict[str, Path] | None = None
        for kind in (self._versions, self._frozen):
            kind.mkdir(mode=0o700, parents=True, exist_ok=True)

    def digests(self) -> tuple[str, ...]:
        """Digests of what is held: versions first, the newest first."""
        return tuple(self._paths())

    def load(self, digest: str) -> bytes:
        """What is held under a digest.

        Raises:
            NotFoundError: nothing is.
            IntegrityError: the file was damaged; it is given up.
        """
        path = self._paths().get(digest)
        if path is None or not path.exists():
            raise NotFoundError(f"no tensors with digest {digest} are held")
        data = path.read_bytes()
        if (found := digest_of(data)) != digest:
            path.unlink()
            self._known = None
            raise IntegrityError(f"the held tensors {digest} are {found} now; the file was damaged")
        return data

    def keep_version(self, run_id: str, data: bytes) -> None:
        """Hold the newest version of a run in place of the one before. A disk that is full keeps nothing."""
        self._keep(self._versions / hashlib.sha256(run_id.encode()).hexdigest()[:32], data)

    def keep_frozen(self, data: bytes) -> None:
        """Hold frozen tensors."""
        self._keep(self._frozen / digest_of(data).removeprefix("sha256:"), data)

    def _keep(self, path: Path, data: bytes) -> None:
        digest = digest_of(data)
        if self._paths().get(digest) == path:
            return
        try:
            atomic_write(path, data, mode=0o600)
            for old in _newest_first(path.parent)[_KEPT:]:
                old.unlink()
        except OSError as error:
            _LOG.warning("tensors are not held: %s", error)
        self._known = None

    def _paths(self) -> dict[str, Path]:
        if self._known is None:
            files = [*_newest_first(self._versions), *_newest_first(self._frozen)]
            self._known = {digest_of(path.read_bytes()): path for path in files}
        return self._known


class Downloads:
    """What tasks start from.

    Args:
        artifacts: what comes over the network.
        held: what need not.
    """

    def __init__(self, artifacts: ArtifactStore, held: HeldTensors) -> None:
        self._artifacts, self._held = artifacts, held

    def held(self) -> tuple[str, ...]:
        """Digests for the poll."""
        return self._held.digests()

    def from_held(self, task: Task, plan: Plan) -> Tensors | None:
        """The tensors of a task from what is held, checked; None when they must come whole.

        Raises:
            TransportError: the network failed.
        """
        if not task.held_digest:
            return None
        try:
            tensors = self._made(task, plan)
        except (IntegrityError, ShapeError, NotFoundError) as error:
            _LOG.warning("round %d of %s comes whole: %s", task.round_number, task.run_id, error)
            return None
        self._keep(task, plan, tensors)
        return tensors

    def whole(self, task: Task, plan: Plan) -> Tensors:
        """The tensors of a task as they come, checked.

        Raises:
            IntegrityError: too large, or the bytes do not match the digest.
            ShapeError: they are not those of the plan, or not finite.
            TransportError: the network failed.
        """
        arrived = b"" if task.held_digest else task.tensors
        data = self._artifacts.fetch_once(task.tensors_digest, task.tensors_bytes, arrived)
        tensors = decode_tensors(data, plan.download_specs())
        check_finite(tensors)
        self._keep(task, plan, tensors)
        return tensors

    def _made(self, task: Task, plan: Plan) -> Tensors:
        held = self._held.load(task.held_digest)
        if task.difference_digest:
            if task.difference_bytes > task.tensors_bytes:
                raise IntegrityError(
                    f"the difference has {task.difference_bytes} bytes, the whole tensors {task.tensors_bytes}"
                )
            data = self._artifacts.fetch_once(task.difference_digest, task.difference_bytes, task.tensors)
            tensors = plan.download_format().apply(decode_tensors(held), data)
            held = encode_tensors(tensors)
        else:
            tensors = decode_tensors(held, plan.download_specs())
        if (found := digest_of(held)) != task.tensors_digest:
            raise IntegrityError(f"the difference led to {found}, the task starts from {task.tensors_digest}")
        check_finite(tensors)
        return tensors

    def _keep(self, task: Task, plan: Plan, tensors: Tensors) -> None:
        """Hold what the next task may begin at."""
        if plan.downlink is not None:
            self._held.keep_version(task.run_id, encode_tensors(tensors))
        if frozen := frozen_bytes(plan.download_specs(), tensors):
            self._held.keep_frozen(frozen)


def _newest_first(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
