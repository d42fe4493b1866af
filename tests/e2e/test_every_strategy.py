"""Every strategy between a service and four agents, each a process, over mutual TLS, one run after the other.

Each run is done again in this process (``replayed_rounds``): what every device handed in, what the service made of it
and what the devices kept must be the same bit for bit. What a strategy promises is then checked on these tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fleet_processes import (
    PEOPLE,
    Fleet,
    Kit,
    hasty_model,
    record_people,
    simulated_contract,
    wait_for,
    write_model,
)
from replayed_rounds import Replay, windows_of
from wearfleet_cloud.config import load_settings
from wearfleet_cloud.federated import STRATEGIES, create_strategy
from wearfleet_cloud.federated.base import LEARNED_ROLES
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.round import Round, RoundPolicy
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import start_run, tensors_of_model
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.blobs import Blobs
from wearfleet_cloud.storage.run_records import list_rounds, list_submissions
from wearfleet_edge.local_state import LocalState
from wearfleet_protos.privacy import clipped, joint_norm
from wearfleet_protos.tensors import TensorGroup, decode_tensors, tensor_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from wearfleet_cloud.federated.aggregate import Arrays
    from wearfleet_cloud.storage.run_records import RoundRow, Submission
    from wearfleet_models import Classifier

pytestmark = [pytest.mark.e2e, pytest.mark.broker]

TRAINING = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}
SEED = 2
LIMITED, LIMIT = PEOPLE[1], 2
"""Whose device trains no higher rank of EPFL's factors."""
NOISE = {"noise_multiplier": 1.0, "clip": 0.05}


@dataclass(frozen=True)
class Case:
    """A run: strategy and options, the network that devices need, how many rounds train and how many join each."""

    strategy: str
    options: Mapping[str, object] = field(default_factory=dict)
    network: str = "cnn"
    rounds: int = 3
    members: int = len(PEOPLE)


CASES = {
    "ditto": Case("ditto", {"pull": 0.3}),
    "fedadagrad": Case("fedadagrad", {"server_learning_rate": 0.03}),
    "fedadam": Case("fedadam", {"server_learning_rate": 0.03}),
    "fedap": Case("fedap", {"warmup_rounds": 1, "own_weight": 0.4}),
    "fedavg": Case("fedavg"),
    "fedavg, int8": Case("fedavg", {"codec": "int8"}),
    "fedavg, trimmed mean": Case("fedavg", {"rule": "trimmed-mean", "trim": 0.25, "attackers": 1}),
    "fedavgm": Case("fedavgm", {"server_momentum": 0.5}),
    "fedbn": Case("fedbn"),
    "fedbuff": Case("fedbuff", {"buffer_size": 2, "concurrency": 4}, members=2),
    "fedhealth2": Case("fedhealth2", {"personalise": "coral_finetune"}),
    "fednova": Case("fednova", {"mu": 0.1, "epochs": 2}),
    "fedper": Case("fedper"),
    "fedprox": Case("fedprox", {"mu": 0.1}),
    "fedrep": Case("fedrep", {"head_epochs": 2}),
    "fedyogi": Case("fedyogi", {"server_learning_rate": 0.03}),
    "local": Case("local"),
    "metafed": Case("metafed", {"warm_rounds": 1, "laps": 1, "threshold": 0.3}, rounds=1 + len(PEOPLE)),
    "perfedavg": Case("perfedavg", {"batch_size": 4}),
    "scaffold": Case("scaffold"),
    "fedavg, local privacy": Case("fedavg", {"dp": "local", **NOISE}, "cnn-plain"),
    "fedavg, central privacy": Case("fedavg", {"dp": "central", "expected_cohort": 4, **NOISE}, "cnn-plain"),
    "fedclip": Case("fedclip", {"target": "class_soft"}, "fedclip"),
    "zoopfl": Case("zoopfl", {"reconstruction_rounds": 1, "estimator": "random"}, "zoopfl"),
    "epfl": Case("epfl", {}, "epfl"),
}
"""Grouped by network, so that devices change it as seldom as can be."""


def test_every_strategy_has_a_case() -> None:
    on_its_own = {"metafed-site"}  # rounds of a site in a ring: test_ring_of_sites.py
    assert {case.strategy for case in CASES.values()} | on_its_own == STRATEGIES.keys()


def network(name: str) -> Classifier:
    """The network that devices need, by the strategy that changes it, or its backbone."""
    if name not in STRATEGIES:
        return hasty_model(name)
    model = hasty_model("transformer", feedforward=64) if name == "epfl" else hasty_model("cnn")
    return create_strategy(name, {}).network(model, seed=0)


@dataclass
class Place:
    """The fleet, the reference network of FedHealth 2, and the network that devices have."""

    fleet: Fleet
    reference: Path
    models: dict[str, Classifier] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    released: str = ""

    def release(self, name: str) -> None:
        """Have every device run this network; they look at their start."""
        if self.released == name:
            return
        version = len(self.files) + 1
        self.models[name] = network(name)
        self.files[name] = write_model(self.reference.parent / f"{version}.onnx", self.models[name], version)
        self.fleet.processes.stop(PEOPLE)
        self.fleet.admin("models", "publish", str(self.files[name]))
        for person in PEOPLE:
            self.fleet.start_agent(person, "--verbose")
        running = "SELECT COUNT(*) FROM devices WHERE model_version = ?"
        wait_for(f"all run version {version}", lambda: self.fleet.rows(running, version) == [(len(PEOPLE),)])
        self.released = name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A service and four enrolled devices; a reference network that has seen none of the four people."""
    root = tmp_path_factory.mktemp("every-strategy")
    with Fleet(root / "fleet", Kit(root, root, record_people(root))) as fleet:
        fleet.start_service()
        for person in PEOPLE:
            fleet.enrol(person)
        fleet.device(LIMITED).config.write_text(f"[federation]\nmax_lora_rank = {LIMIT}\n")
        reference = root / "reference"
        fleet.processes.call(
            "train",
            ["wearfleet-cloud", "train", "--dataset", "simulator", "--scenario", "cross-person", "--target", "0",
             "--algorithm", "erm", "--backbone", "cnn", "--steps", "20", "--out", str(reference),
             "--cache-dir", str(root / "cache"), "--json"],
        )  # fmt: skip
        yield Place(fleet, reference)


@dataclass(frozen=True)
class Run:
    """A run that is over: its records, and the same run done again."""

    case: Case
    run_id: str
    rounds: list[RoundRow]
    submissions: list[Submission]
    replay: Replay
    trained: tuple[Round, ...]
    last: Round

    @property
    def first(self) -> Arrays:
        return self.replay.tensors(self.trained[0].base)

    @property
    def final(self) -> Arrays:
        return self.replay.tensors(self.last.base)

    @property
    def state(self) -> Arrays:
        return self.replay.state(self.last.base_state)


def run_to_its_end(place: Place, case: Case) -> Run:
    """Start a run as the command line does, wait for its end, and read everything back."""
    place.release(case.network)
    fleet = place.fleet
    options = {**TRAINING, **case.options}
    if case.strategy == "fedhealth2":
        options["reference"] = str(place.reference)
    strategy = create_strategy(case.strategy, options)
    plan, graphs = build_plan(
        strategy, place.models[case.network], simulated_contract(), plan_id=case.strategy, seed=SEED
    )
    state = open_state(load_settings(None, {"service": {"state_dir": fleet.cloud}}))
    try:
        tensors = tensors_of_model(place.files[case.network].read_bytes(), plan.download_specs())
        run_id = start_run(
            state.database, state.blobs, state.keys, plan=plan, graphs=graphs, tensors=tensors,
            settings=RunSettings(
                rounds=case.rounds,
                cohort=CohortPolicy(min_connected=4),
                policy=RoundPolicy(quorum=1 if case.strategy == "metafed" else case.members, deadline_s=60.0),
                options=options,
            ),
            now_ns=time.time_ns(),
        )  # fmt: skip
        running = "SELECT state, reason FROM runs WHERE run_id = ?"
        wait_for("the run ends", lambda: fleet.rows(running, run_id) != [("running", "")])
        assert fleet.rows(running, run_id) == [("done", "")]
        with state.database.read() as connection:
            rounds, submissions = list_rounds(connection, run_id), list_submissions(connection, run_id)
    finally:
        state.database.close()
    people = {
        device: windows_of(fleet.kit.recordings[name], plan.contract)
        for name, device in fleet.device_ids.items()
    }
    replay = Replay(
        case.strategy, options, plan, graphs, people, Blobs(fleet.cloud / "artifacts"),
        ranks={fleet.device_ids[LIMITED]: LIMIT},
    )  # fmt: skip
    *trained, last = [Round.from_dict(row.snapshot) for row in rounds]
    return Run(case, run_id, rounds, submissions, replay, tuple(trained), last)


@pytest.mark.parametrize("name", CASES)
def test_a_run_over_four_processes_is_what_the_strategy_says(name: str, place: Place) -> None:
    case = CASES[name]
    run = run_to_its_end(place, case)
    assert_every_device_counted_once(run, set(place.fleet.device_ids.values()))
    for done in run.trained:
        updates = {receipt.client: (receipt, update) for receipt, update, _ in run.replay.updates(done)}
        CHECKS_OF_A_ROUND.get(case.options.get("dp"), assert_same_round)(run, done, updates)
    assert_only_what_is_uploaded_has_moved(run)
    for person, device in place.fleet.device_ids.items():
        assert_the_device_has_what_it_should(run, place.fleet, person, device)


def assert_every_device_counted_once(run: Run, devices: set[str]) -> None:
    """The right rounds, all published, and no submission twice."""
    kinds = [*["train"] * run.case.rounds, "personalise"]
    found = [(row.round, row.kind, row.state) for row in run.rounds]
    wanted = [(number, kind, "published") for number, kind in enumerate(kinds, start=1)]
    assert found == wanted, run.trained
    counted = Counter((s.round, s.device_id) for s in run.submissions)
    assert set(counted.values()) == {1}
    members = {n: {device for number, device in counted if number == n} for n in range(1, len(kinds) + 1)}
    ring = run.case.strategy == "metafed"
    for number, kind in enumerate(kinds, start=1):
        if kind == "train" and (ring and number > 1):
            assert len(members[number]) == 1
        elif kind == "train" and run.case.members < len(devices):
            assert len(members[number]) == run.case.members
        else:
            assert members[number] == devices
    assert not any(done.declined or done.rejected or done.lost for done in (*run.trained, run.last))


def assert_same_round(run: Run, done: Round, updates: dict[str, Any]) -> None:
    """The service made of the updates what the strategy makes of them here."""
    folded = run.replay.folded(done, updates)
    assert_same(run.replay.tensors(done.result), folded.tensors)
    assert_same(run.replay.state(done.result_state), folded.state)


def assert_same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_noised_at_devices(run: Run, done: Round, updates: dict[str, Any]) -> None:
    """Each device clips and adds noise of 2 z C; the mean of four has half as much, and no figure is told."""
    options = run.case.options
    short = {
        device: (receipt, clipped(update, joint_norm(update), options["clip"]))
        for device, (receipt, update) in updates.items()
    }
    noise = 2.0 * options["clip"] * options["noise_multiplier"] / 2.0
    assert_noise(run.replay.tensors(done.result), run.replay.folded(done, short, dp="off").tensors, noise)
    for row in run.submissions:
        if row.round == done.number:
            assert (row.num_examples, row.num_steps, row.train_seconds, row.metrics) == (1, 0, 0.0, {})


def assert_noised_at_the_service(run: Run, done: Round, updates: dict[str, Any]) -> None:
    """Noise of z C in the sum, divided by the four that were expected."""
    options = run.case.options
    plain = run.replay.folded(done, updates, noise_multiplier=0.0)
    noise = options["noise_multiplier"] * options["clip"] / 4.0
    assert_noise(run.replay.tensors(done.result), plain.tensors, noise)


def assert_noise(found: Arrays, plain: Arrays, deviation: float) -> None:
    """What lies between two models is Gaussian noise of this size, in every number."""
    trained = [name for name in plain if not name.startswith("standardise.")]
    noise = np.concatenate([(found[name].astype(np.float64) - plain[name]).ravel() for name in trained])
    # mean and standard deviation of n numbers err by s / sqrt(n) and s / sqrt(2 n); five times that in one of 2e6
    assert abs(noise.mean()) < 5.0 * deviation / np.sqrt(noise.size)
    assert abs(noise.std() / deviation - 1.0) < 5.0 / np.sqrt(2.0 * noise.size)


CHECKS_OF_A_ROUND = {"local": assert_noised_at_devices, "central": assert_noised_at_the_service}


def assert_only_what_is_uploaded_has_moved(run: Run) -> None:
    """Of the model, tensors of uploaded roles have moved and no others; what a strategy adds beside it, it decides.

    In MetaFed's ring a model travels as tensors beside the model, and becomes the global one.
    """
    upload = create_strategy(run.case.strategy, run.replay.options).info.upload()
    if run.case.strategy == "metafed":
        upload = replace(upload, roles=LEARNED_ROLES, groups=(TensorGroup.PARAM, TensorGroup.BUFFER))
    for spec in run.replay.plan.download_specs():
        if spec.group in (TensorGroup.PARAM, TensorGroup.BUFFER):
            moves = spec.role in upload.roles and spec.group in upload.groups
            same = np.array_equal(run.first[spec.name], run.final[spec.name])
            if not moves:
                assert same, f"{spec.name} ({spec.role})"
            elif len(spec.shape) > 1:  # the slope of a bias before normalisation is 0
                assert not same, f"{spec.name} ({spec.role})"


def assert_the_device_has_what_it_should(run: Run, fleet: Fleet, person: str, device: str) -> None:
    """Its own tensors, and the model that it uses now, are those of the run done again."""
    wait_for(
        f"{person} has personal weights of {run.run_id}", lambda: personal_run(fleet, person) == run.run_id
    )
    specs = run.replay.plan.local_specs()
    found, damaged = LocalState(fleet.device(person)).local_tensors(run.run_id, specs)
    assert not damaged
    assert_same(found, run.replay.kept.get(device, {}))  # no buffer may have counted it
    personal = decode_tensors(fleet.device(person).personal.read_bytes())
    assert_same(personal, run.replay.personal(device, run.last))


def personal_run(fleet: Fleet, person: str) -> str:
    """The run that a device has its personal tensors from."""
    file = fleet.device(person).personal
    return tensor_metadata(file.read_bytes())["run_id"] if file.exists() else ""
