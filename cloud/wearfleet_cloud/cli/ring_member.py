"""A site as a member of its ring: the agent's own client of federated rounds, whose training is a federation.

The ring's service sees one more device. Leases, resumable transfers, submissions that may be repeated, and what is kept
until a receipt came, are the agent's (``wearfleet_edge.federated``); only its trainer is another one.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from datetime import UTC, datetime
from functools import partial
from random import SystemRandom
from typing import TYPE_CHECKING, Final

import numpy as np
from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.federated import Device, FederatedWorker
from wearfleet_edge.heartbeat import renew_if_due
from wearfleet_edge.identity import load_enrolment, require_valid_certificate, secure_identity
from wearfleet_edge.local_state import LocalState
from wearfleet_edge.memory import resident_bytes
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.runtime import Evaluation
from wearfleet_edge.slots import InstalledModel
from wearfleet_edge.state import StateDirectory, atomic_write, lock_directory
from wearfleet_edge.trainer import Limits, PlanResult
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_protos.errors import DeniedError, NotFoundError, WearfleetError
from wearfleet_protos.secagg.keys import KEY_BYTES

from wearfleet_cloud.ring.sealing import Route, Sealer
from wearfleet_cloud.ring.site import Site, SiteTurn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wearfleet_edge.local_state import PersonalOrigin
    from wearfleet_edge.secagg_client import Member
    from wearfleet_edge.trainer import Tensors
    from wearfleet_edge.transport.cloud import Task
    from wearfleet_protos.plan import Plan
    from wearfleet_protos.tensors import Digest

    from wearfleet_cloud.service.run_context import RunSettings
    from wearfleet_cloud.service.state import State

__all__ = ["RingMember", "SiteTrainer", "ring_folder"]

_LOG: Final = logging.getLogger(__name__)
_POLL_S: Final = 20.0
_RENEWAL_CHECK_S: Final = 3600.0
_MOST_BYTES: Final = 4e9
_LONGEST_S: Final = 7 * 86_400.0


def ring_folder(state_dir: Path) -> StateDirectory:
    """Where a site keeps what it is in its ring."""
    return StateDirectory(state_dir / "ring")


class SiteTrainer:
    """Implements the agent's ``federated.Trainer`` by a site's turns.

    Args:
        site: its service.
        classes: of the model.
    """

    def __init__(self, site: Site, classes: int) -> None:
        self._site, self._classes = site, classes
        self._metrics: Mapping[str, float] = {}

    def run(
        self,
        plan: Plan,
        graphs: Mapping[Digest, bytes],  # noqa: ARG002 - what they would do to one device's state, the site's run does
        before: Tensors,
        *,
        task: Task,
        limits: Limits,
    ) -> PlanResult:
        """A turn; for its errors see ``Site.turn``."""
        route = Route(task.run_id, task.plan_digest, task.round_number)
        turn = SiteTurn(plan, before, task.attempt_id, route, task.personalise)
        begin = limits.monotonic()

        def stopped() -> bool:
            return limits.stopped() or limits.monotonic() - begin > limits.seconds

        done = self._site.turn(turn, stopped)
        self._metrics = done.metrics
        _LOG.info("round %d of %s was the site's run %s", task.round_number, task.run_id, done.run_id)
        return PlanResult(done.state, done.metrics, done.num_examples, done.num_steps, done.seconds)

    def base(self) -> Evaluation:
        """The released model on the site's devices, as they said in the last turn."""
        return self._evaluation("base")

    def personalise(
        self,
        plan: Plan,  # noqa: ARG002 - the site's devices have put the site's model to use
        result: PlanResult,  # noqa: ARG002
        installed: InstalledModel,  # noqa: ARG002
        origin: PersonalOrigin,  # noqa: ARG002
    ) -> tuple[bytes, Evaluation]:
        """Nothing is kept here: the result of the last stage is the site's run, and is on its devices."""
        return b"", self._evaluation("evaluate_after")

    def _evaluation(self, phase: str) -> Evaluation:
        correct, count = (int(self._metrics.get(f"{phase}/{what}", 0.0)) for what in ("correct", "count"))
        return Evaluation(correct, count, np.zeros((self._classes, self._classes), np.int64))


class RingMember:
    """The process of a site in its ring.

    Args:
        state_dir: of the site's service; the identity in the ring lies below it.
        state: of the site's service.
        plan: of ``metafed-site``.
        graphs: of the plan.
        settings: of a turn's run.

    Raises:
        NotFoundError: the site is in no ring, or has released no model.
        ConflictError: another process of this site runs.
        ConfigError: the certificate has expired.
        IntegrityError: the released model is refused.
    """

    def __init__(
        self,
        state_dir: Path,
        state: State,
        *,
        plan: Plan,
        graphs: Mapping[Digest, bytes],
        settings: RunSettings,
    ) -> None:
        self._folder = ring_folder(state_dir)
        if not self._folder.enrolment.exists():
            raise NotFoundError(f"{state_dir} is in no ring; use `wearfleet-cloud ring join TICKET` first")
        enrolment = load_enrolment(self._folder)
        self._lock = lock_directory(self._folder)
        require_valid_certificate(self._folder, datetime.now(UTC))
        self.device_id = enrolment.device_id
        self._stop = threading.Event()
        self._backoff = Backoff(0.5, 30.0, SystemRandom().random)
        self._cloud = RpcCloud.of_device(self._folder, enrolment, "gateway")
        sealer = Sealer(self.device_id, *secure_identity(self._folder), partial(_secret, self._folder))
        site = Site(state, plan, graphs, settings, sealer=sealer, wait=self._stop.wait)
        self._worker = self._make_worker(
            enrolment.signing_keys, SiteTrainer(site, len(plan.contract.labels)), _released(state)
        )

    def _make_worker(
        self, keys: Mapping[str, bytes], trainer: SiteTrainer, released: InstalledModel
    ) -> FederatedWorker:
        active = ActiveModel()
        active.use(released, None)
        device = Device(
            keys=keys,
            trainer=trainer,
            limits=self._limits,
            max_bytes=_MOST_BYTES,
            poll_seconds=_POLL_S,
            wait=self._stop.wait,
            member=_no_member,
        )
        folder = self._folder.artifacts / "plans"
        return FederatedWorker(
            cloud=self._cloud,
            artifacts=ArtifactStore(folder, self._cloud, self._backoff, self._stop.wait),
            local=LocalState(self._folder),
            active=active,
            device=device,
            backoff=self._backoff,
        )

    def run(self) -> None:
        """Take turns until :meth:`stop`; after an error wait longer each time."""
        failures, next_renewal = 0, 0.0
        try:
            while not self._stop.is_set():
                try:
                    if time.monotonic() >= next_renewal:
                        next_renewal = time.monotonic() + _RENEWAL_CHECK_S
                        if renew_if_due(self._cloud, self._folder, self.device_id, datetime.now(UTC)):
                            self._cloud.reopen()
                    delay, failures = self._worker.step(), 0
                except WearfleetError as error:
                    failures += 1
                    delay = self._backoff.delay(failures)
                    if not self._stop.is_set():
                        _LOG.warning("the ring: %s; next try in %.1f s", error, delay)
                self._stop.wait(max(delay, 0.02))
        finally:
            self._cloud.close()
            self._lock.close()

    def stop(self) -> None:
        """End soon; a turn under way goes on in the site's service."""
        self._stop.set()
        self._cloud.close()

    def _limits(self, remaining_s: float) -> Limits:
        return Limits(
            seconds=min(_LONGEST_S, remaining_s),
            memory_bytes=float("inf"),
            resident_bytes=resident_bytes,
            monotonic=time.monotonic,
            stopped=self._stop.is_set,
        )


def _secret(folder: StateDirectory, run_id: str) -> bytes:
    """This site's X25519 secret for a run; made when it is first wanted."""
    path = folder.key.parent / f"ring-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}.key"
    if not path.exists():
        atomic_write(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
    return path.read_bytes()


def _released(state: State) -> InstalledModel:
    current = state.registry.current()
    if current is None:
        raise NotFoundError(
            "the site has released no model; use `models publish` with the ring's model first"
        )
    published, manifest = current
    return InstalledModel(published.manifest_digest, manifest, state.registry.model(published))


def _no_member() -> Member:
    raise DeniedError("a ring has no secure aggregation: each model goes to the next site alone")
