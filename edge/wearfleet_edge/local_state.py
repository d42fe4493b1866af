"""What federated learning keeps on the device: tensors of a run, what its codec lost, and a result without receipt.

A result is written to ``pending`` and becomes the device's state only when the server has counted it; so a round
that the server never counted leaves no trace, whenever the power fails.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from wearfleet_protos.codecs import Residual
from wearfleet_protos.errors import DataError, WearfleetError
from wearfleet_protos.tensors import decode_tensors, encode_tensors, tensor_metadata

from wearfleet_edge.downloads import HeldTensors
from wearfleet_edge.runtime import Personal
from wearfleet_edge.state import atomic_write, read_json, sync_directory, write_json
from wearfleet_edge.transport.cloud import Submission

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wearfleet_protos.tensors import TensorSpec

    from wearfleet_edge.state import StateDirectory
    from wearfleet_edge.trainer import Tensors

__all__ = ["LocalState", "PendingResult", "PersonalOrigin", "RoundNotes", "encode_personal"]

_KEPT_RUNS = 4
_NOTED_RUNS = 1000
_PARTS = ("update", "local", "personal", "residual")


@dataclass(frozen=True, slots=True)
class PersonalOrigin:
    """Where personal tensors come from: the release they fit, and the round that made them."""

    manifest_digest: str
    run_id: str
    round_number: int


@dataclass(frozen=True, slots=True)
class PendingResult:
    """A computed result: what to submit, the update's bytes (empty when none), and what to keep once it counts.

    ``residual`` is :meth:`Residual.to_bytes` of what the update's codec lost, empty when nothing is owed.
    """

    submission: Submission
    update: bytes
    local: bytes
    personal: bytes
    residual: bytes = b""


class RoundNotes:
    """The last round of each of the latest runs, in a file.

    Args:
        path: the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def last(self, run_id: str) -> int:
        """The last round of a run that was noted; 0 for none.

        Raises:
            DataError: the file is damaged.
        """
        return dict(self._rounds()).get(run_id, 0)

    def note(self, run_id: str, round_number: int) -> None:
        """Remember a round.

        Raises:
            DataError: the file is damaged.
        """
        others = [row for row in self._rounds() if row[0] != run_id]
        write_json(self._path, {"rounds": [*others, (run_id, round_number)][-_NOTED_RUNS:]})

    def _rounds(self) -> list[tuple[str, int]]:
        if not self._path.exists():
            return []
        try:
            return [(str(run_id), int(number)) for run_id, number in read_json(self._path)["rounds"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self._path}: damaged ({error!r}); delete it") from error


class LocalState:
    """Files below ``federated`` and the personal tensors.

    Args:
        state: the agent's directory.

    Attributes:
        held: tensors of earlier tasks, which need not come again.
        joined: rounds for which this device shared keys of secure aggregation.
        noised: rounds for which it made an update with noise of its own.
    """

    def __init__(self, state: StateDirectory) -> None:
        self._personal = state.personal
        self._pending = state.federated / "pending"
        self._runs = state.federated / "runs"
        self._residuals = state.federated / "residuals"
        self.joined = RoundNotes(state.federated / "joined.json")
        self.noised = RoundNotes(state.federated / "noised.json")
        self.held = HeldTensors(state.federated / "held")
        for folder in (self._pending, self._runs, self._residuals):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def local_tensors(self, run_id: str, specs: Iterable[TensorSpec]) -> tuple[Tensors, bool]:
        """Tensors kept from the last counted round of a run.

        Returns:
            The tensors, empty when there are none; and whether some were lost because their file is damaged.
        """
        path = self._runs / _file_name(run_id)
        if not path.exists():
            return {}, False
        try:
            return decode_tensors(path.read_bytes(), specs), False
        except WearfleetError:
            return {}, True

    def residual(self, run_id: str) -> tuple[Residual, bool]:
        """What the last counted update of a run left behind; and whether it was lost because its file is damaged."""
        path = self._residuals / _file_name(run_id)
        if not path.exists():
            return Residual(), False
        try:
            return Residual.from_bytes(path.read_bytes()), False
        except WearfleetError:
            return Residual(), True

    def save(self, result: PendingResult) -> None:
        """Keep a result until its receipt; the submission is written last, so it is whole or not there."""
        self.discard()
        for name in _PARTS:
            data = getattr(result, name)
            if data:
                atomic_write(self._pending / name, data)
        write_json(self._pending / "submission.json", asdict(result.submission))

    def pending(self) -> PendingResult | None:
        """The result that waits for its receipt, if there is one."""
        path = self._pending / "submission.json"
        if not path.exists():
            return None
        try:
            submission = Submission(**read_json(path))
        except TypeError as error:
            raise DataError(f"{path}: damaged ({error}); delete the folder {self._pending}") from error
        return PendingResult(submission, **{name: self._read(name) for name in _PARTS})

    def promote(self, result: PendingResult) -> None:
        """The server has counted the result: what it made is the device's state now. Safe to repeat."""
        for folder, data in ((self._runs, result.local), (self._residuals, result.residual)):
            if data:
                atomic_write(folder / _file_name(result.submission.run_id), data)
                _forget_old_runs(folder)
        if result.personal:
            atomic_write(self._personal, result.personal, mode=0o600)
        self.discard()

    def discard(self) -> None:
        """Forget the pending result; the submission goes first."""
        (self._pending / "submission.json").unlink(missing_ok=True)
        sync_directory(self._pending)
        shutil.rmtree(self._pending)
        self._pending.mkdir(mode=0o700)

    def personal(self, manifest_digest: str) -> Personal | None:
        """Personal tensors for a release, None when there are none for it.

        Raises:
            IntegrityError: the file is damaged.
        """
        if not self._personal.exists():
            return None
        data = self._personal.read_bytes()
        metadata = tensor_metadata(data)
        if metadata.get("manifest_digest") != manifest_digest:
            return None
        return Personal(decode_tensors(data), float(metadata["ood_threshold"]))

    def _read(self, name: str) -> bytes:
        path = self._pending / name
        return path.read_bytes() if path.exists() else b""


def _file_name(run_id: str) -> str:
    return hashlib.sha256(run_id.encode()).hexdigest()[:32]


def _forget_old_runs(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in files[:-_KEPT_RUNS]:
        path.unlink()


def encode_personal(personal: Personal, origin: PersonalOrigin) -> bytes:
    """Bytes of personal tensors with where they come from."""
    metadata = {
        "manifest_digest": origin.manifest_digest,
        "run_id": origin.run_id,
        "round": str(origin.round_number),
        "ood_threshold": repr(personal.ood_threshold),
    }
    return encode_tensors(personal.tensors, metadata)
