"""A turn as tensors and as a run: what a site refuses, begins, waits for, and finds again."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from oracles.compiled import compiled_plan
from oracles.small_federation import arrays, model
from service_harness import service_settings
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.ring.sealing import Route, Sealer
from wearfleet_cloud.ring.site import Site, SiteTurn
from wearfleet_cloud.ring.turns import check_teacher, closing, opening, plan_of_turn
from wearfleet_cloud.service.run_context import RunSettings
from wearfleet_cloud.service.run_setup import TENSORS_MEDIA_TYPE
from wearfleet_cloud.service.state import open_state
from wearfleet_cloud.storage.catalog import insert_artifact
from wearfleet_cloud.storage.run_records import finish_run, list_runs, set_run_tensors
from wearfleet_edge.trainer import start_state, upload_tensors
from wearfleet_protos.errors import DeniedError, IntegrityError
from wearfleet_protos.plan import Plan
from wearfleet_protos.secagg.identity import KnownKeys, KnownKeySigner
from wearfleet_protos.tensors import decode_tensors, digest_of, encode_tensors

NETWORK = model("cnn")
VARIANCE = next(n for n in arrays(NETWORK) if n.endswith("running_var"))


def ring_plan() -> Plan:
    return compiled_plan(create_strategy("metafed", {}), NETWORK, plan_id="ring", seed=5)[0]


def site_built() -> tuple[Plan, Mapping[str, bytes]]:
    return compiled_plan(create_strategy("metafed-site", {}), NETWORK, plan_id="site", seed=3)


def site_plan() -> Plan:
    return site_built()[0]


def before(stage: float = 1.0, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """The state of a site whose own model is NETWORK and whose teacher is another one."""
    teacher = {f"teacher/{name}": array for name, array in arrays(model("cnn", seed=3)).items()}
    known = {**arrays(NETWORK), **teacher, "stage": np.float32(stage)}
    downloaded = {
        s.name: np.asarray(known.get(s.name, np.zeros(s.shape)), s.dtype)
        for s in ring_plan().download_specs()
    }
    kept = {
        s.name: np.asarray(known.get(s.name, np.zeros(s.shape)), s.dtype) for s in ring_plan().local_specs()
    }
    return {**start_state(ring_plan(), downloaded, kept), **changes}


POISON: dict[str, dict[str, np.ndarray]] = {
    "NaN": {"teacher/head.bias": np.full(4, np.nan, np.float32)},
    "head.bias": {"teacher/head.bias": np.zeros(5, np.float32)},
    "negative": {f"teacher/{VARIANCE}": -np.ones_like(arrays(NETWORK)[VARIANCE])},
}


@pytest.mark.parametrize("words", POISON)
def test_a_teacher_that_no_site_may_take_over_is_refused(words: str) -> None:
    check_teacher(before(), ring_plan())
    with pytest.raises(IntegrityError, match=f"teacher is refused: .*{words}"):
        check_teacher(before(**POISON[words]), ring_plan())


def test_a_turn_begins_with_the_sites_model_and_ends_as_a_devices_would() -> None:
    state = before(stage=1.0, good_enough=np.float32(1.0))
    start = opening(state, site_plan(), personal=False)
    assert start.keys() == {s.name for s in site_plan().download_specs()}
    np.testing.assert_array_equal(start["head.weight"], arrays(NETWORK)["head.weight"])
    np.testing.assert_array_equal(start["teacher/head.weight"], state["teacher/head.weight"])
    assert (float(start["stage"]), float(start["good_enough"]), float(start["trains"])) == (1.0, 1.0, 0.0)
    assert float(opening(state, site_plan(), personal=True)["stage"]) == 2.0
    assert (
        float(opening(before(stage=0.0), site_plan(), personal=True)["stage"]) == 0.0
    )  # there is no teacher
    made = {**start, "turns": np.float32(1.0), "head.weight": start["head.weight"] + 1}
    after = closing(state, made, ring_plan())
    update = upload_tensors(ring_plan(), state, after)
    np.testing.assert_array_equal(update["sent/head.weight"], made["head.weight"])
    assert float(after["good_enough"]) == 1.0
    with pytest.raises(DeniedError, match="too few"):
        closing(state, start, ring_plan())


def test_a_plan_for_another_model_or_another_strategy_is_refused() -> None:
    plan = plan_of_turn(ring_plan(), site_plan(), "a1", 2)
    assert plan.plan_id == "turn-a1"
    assert plan.seed != plan_of_turn(ring_plan(), site_plan(), "a1", 3).seed
    with pytest.raises(IntegrityError, match="another model"):
        plan_of_turn(replace(ring_plan(), model_schema_hash=digest_of(b"other")), site_plan(), "a1", 2)
    with pytest.raises(IntegrityError, match="expected a ring"):
        plan_of_turn(site_plan(), site_plan(), "a1", 2)


class Bench:
    """A site's state without a running service: the test plays its part."""

    def __init__(self, tmp_path) -> None:
        self.state = open_state(service_settings(tmp_path))
        self.acts: list[Callable[[], None]] = []
        self.leaves = False
        settings = RunSettings(5, CohortPolicy(0, 2))
        sealer = Sealer(
            "east", KnownKeySigner(Ed25519PrivateKey.generate()), KnownKeys({}), lambda _: bytes(32)
        )
        self.site = Site(self.state, site_plan(), site_built()[1], settings, sealer=sealer, wait=self.wait)

    def wait(self, _: float) -> bool:
        if self.acts:
            self.acts.pop(0)()
        return self.leaves

    def end(self, state: str = "done", turns: float = 1.0) -> None:
        """The service ends the run."""
        (row,) = self.runs()
        tensors = decode_tensors(self.state.blobs.read(row.tensors_digest))
        data = encode_tensors({**tensors, "turns": np.asarray(turns, np.float32)})
        digest = self.state.blobs.put(data)
        with self.state.database.write() as connection:
            insert_artifact(connection, digest, len(data), TENSORS_MEDIA_TYPE, time.time_ns())
            set_run_tensors(connection, row.run_id, digest)
            finish_run(connection, row.run_id, state, time.time_ns(), "as the test says")

    def leave(self) -> None:
        self.leaves = True

    def runs(self):
        with self.state.database.read() as connection:
            return list_runs(connection)


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.state.database.close()


def the_turn() -> SiteTurn:
    return SiteTurn(ring_plan(), before(), "a1", Route("run-1", digest_of(b"plan"), 2), personal=False)


def test_a_turn_is_one_run_however_often_the_process_is_killed(bench) -> None:
    bench.acts = [bench.leave]
    with pytest.raises(DeniedError, match="goes on when it is back"):
        bench.site.turn(the_turn(), lambda: False)
    assert [run.state for run in bench.runs()] == ["running"]
    bench.leaves = False
    bench.acts = [bench.end]
    done = bench.site.turn(the_turn(), lambda: False)
    (run,) = bench.runs()
    assert done.run_id == run.run_id
    assert not run.settings["personalise"]
    again = bench.site.turn(the_turn(), lambda: False)  # killed between the run's end and the receipt
    assert (again.run_id, len(bench.runs())) == (run.run_id, 1)
    np.testing.assert_array_equal(again.state["sent/head.weight"], done.state["sent/head.weight"])
    bench.acts = [lambda: None]
    with pytest.raises(DeniedError, match="nobody waits"):
        bench.site.turn(replace(the_turn(), attempt="a2"), lambda: not bench.acts)
    assert [run.state for run in bench.runs()] == ["done", "stopped"]


def test_a_turn_that_was_not_finished_is_turned_down(bench) -> None:
    bench.acts = [lambda: bench.end(turns=0.0)]
    with pytest.raises(DeniedError, match="before its turn was over"):
        bench.site.turn(the_turn(), lambda: False)


def test_a_run_that_the_sites_operator_stops_is_turned_down(bench) -> None:
    bench.acts = [lambda: bench.end("stopped")]
    with pytest.raises(DeniedError, match="as the test says"):
        bench.site.turn(the_turn(), lambda: False)


def test_a_refused_teacher_begins_no_run(bench) -> None:
    with pytest.raises(IntegrityError, match="teacher is refused"):
        bench.site.turn(replace(the_turn(), before=before(**POISON["NaN"])), lambda: False)
    assert bench.runs() == []
