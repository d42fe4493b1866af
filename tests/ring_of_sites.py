"""A ring of federations in one process: real services, mutual TLS, agents' and sites' workers as threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom

import numpy as np
from oracles.small_federation import CONTRACT, model, splits
from service_harness import enrolment_ticket, service_settings
from wearfleet_cloud.cli.ring_member import RingMember, ring_folder
from wearfleet_cloud.config import Settings
from wearfleet_cloud.export.scored_classifier import fit_ood
from wearfleet_cloud.export.to_onnx import ReleaseInfo, export_bytes
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.metafed_site import MetaFedSite
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.round import RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import start_run, tensors_of_model
from wearfleet_cloud.service.serve import Service
from wearfleet_cloud.service.state import open_state
from wearfleet_edge.artifacts import ArtifactStore
from wearfleet_edge.enrolment import enrol_device
from wearfleet_edge.federated import Device, FederatedWorker
from wearfleet_edge.identity import load_enrolment
from wearfleet_edge.local_state import LocalState
from wearfleet_edge.models import ActiveModel
from wearfleet_edge.own_windows import OwnWindows
from wearfleet_edge.runtime import Evaluation
from wearfleet_edge.slots import InstalledModel
from wearfleet_edge.state import StateDirectory
from wearfleet_edge.trainer import Limits, TrainingData
from wearfleet_edge.transport.backoff import Backoff
from wearfleet_edge.transport.rpc import RpcCloud
from wearfleet_protos.errors import WearfleetError
from wearfleet_protos.windowing import LabelledWindows

Windows = Mapping[str, LabelledWindows]

SITES: dict[str, dict[str, Windows]] = {
    "east": {"anna": splits(1, 45, 21), "ben": splits(2, 40, 30)},
    "north": {"cleo": splits(3, 50, 9), "dora": splits(4, 30, 15)},
    "south": {"emil": splits(5, 45, 12), "finn": splits(6, 35, 20)},
}
NETWORK = model("cnn")


def release() -> tuple[bytes, object]:
    """The model that all sites begin with, and its manifest."""
    windows = SITES["east"]["anna"]
    ood = fit_ood(NETWORK, windows["train"].x, windows["train"].y, windows["holdout"].x)
    return export_bytes(
        NETWORK, CONTRACT, ood, ReleaseInfo("har", 1, "t", "none", simulated=True, created_ns=1)
    )


RELEASE = release()


@dataclass
class Threads:
    """What runs beside a test; all of it ends with the test."""

    stop: threading.Event = field(default_factory=threading.Event)
    running: list[threading.Thread] = field(default_factory=list)
    members: dict[str, RingMember] = field(default_factory=dict)

    def start(self, target: object, *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self.running.append(thread)
        return thread

    def end(self) -> None:
        self.stop.set()
        for member in self.members.values():
            member.stop()
        for thread in self.running:
            thread.join(10.0)


def publish(settings: Settings) -> None:
    """Release the common model in a service."""
    state = open_state(settings)
    try:
        state.registry.publish(RELEASE[0], RELEASE[1], time.time_ns())  # type: ignore[arg-type]
    finally:
        state.database.close()


def device(threads: Threads, folder: Path, service: Service, name: str, windows: Windows) -> None:
    """A real agent's worker of federated rounds, without its telemetry."""
    assert service.running is not None
    place = StateDirectory(folder / name)
    enrol_device(place, enrolment_ticket(service.settings, service.running.enrol, name).encode())
    enrolment = load_enrolment(place)
    cloud = RpcCloud.of_device(place, enrolment)
    active = ActiveModel()
    state = open_state(service.settings)
    current = state.registry.current()
    assert current is not None
    active.use(InstalledModel(current[0].manifest_digest, current[1], RELEASE[0]), None)
    state.database.close()
    backoff = Backoff(0.05, 0.2, SystemRandom().random)
    data = TrainingData(windows["train"], windows["holdout"])
    worker = FederatedWorker(
        cloud=cloud,
        artifacts=ArtifactStore(place.artifacts / "plans", cloud, backoff, threads.stop.wait),
        local=LocalState(place),
        active=active,
        device=Device(
            keys=enrolment.signing_keys,
            trainer=OwnWindows(lambda _: data, lambda: Evaluation(1, 2, np.zeros((4, 4), np.int64))),
            limits=lambda s: Limits(s, 1e12, lambda: 0, time.monotonic, threads.stop.is_set),
            max_bytes=1e9,
            poll_seconds=1.0,
            wait=threads.stop.wait,
            member=lambda: None,  # type: ignore[arg-type, return-value]
        ),
        backoff=backoff,
    )

    def loop() -> None:
        while not threads.stop.is_set():
            with suppress(WearfleetError):
                worker.step()
            threads.stop.wait(0.01)
        cloud.close()

    threads.start(loop)


def site_settings(folder: Path, name: str) -> Settings:
    """Of a site's service."""
    return service_settings(folder / name, broker={"kind": "embedded"})


def join(folder: Path, relay: Service, name: str) -> str:
    """Enrol a site in the ring; its name there."""
    assert relay.running is not None
    ticket = enrolment_ticket(relay.settings, relay.running.enrol, name)
    return enrol_device(ring_folder(folder / name), ticket.encode()).device_id


def start_member(threads: Threads, settings: Settings, name: str, options: Mapping[str, object]) -> None:
    """Run a site's process in the ring, as a thread."""
    strategy = create_strategy("metafed-site", options)
    assert isinstance(strategy, MetaFedSite)
    plan, graphs = build_plan(strategy, NETWORK, CONTRACT, plan_id="site", seed=3)
    turn = RunSettings(
        strategy.rounds, CohortPolicy(0, 2), RoundPolicy(quorum=2, deadline_s=60.0), options, seed=3
    )
    state = open_state(settings)
    member = RingMember(settings.service.state_dir, state, plan=plan, graphs=graphs, settings=turn)
    threads.members[name] = member

    def run() -> None:
        member.run()
        state.database.close()

    threads.start(run)


def start_ring(
    settings: Settings, options: Mapping[str, object], rounds: int, deadline_s: float = 60.0
) -> str:
    """Start the ring's run in its service."""
    strategy = create_strategy("metafed", options)
    plan, graphs = build_plan(strategy, NETWORK, CONTRACT, plan_id="ring", seed=5)
    chosen = RunSettings(
        rounds, CohortPolicy(0, len(SITES)), RoundPolicy(quorum=1, deadline_s=deadline_s), options
    )
    state = open_state(settings)
    try:
        return start_run(
            state.database,
            state.blobs,
            state.keys,
            plan=plan,
            graphs=graphs,
            tensors=tensors_of_model(RELEASE[0], plan.download_specs()),
            settings=chosen,
            now_ns=time.time_ns(),
        )
    finally:
        state.database.close()
