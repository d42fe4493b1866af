"""Down-links as options of a run: in the plan, in both simulations, in what they cost, and where they are refused."""

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED
from oracles.small_federation import model, splits
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.broadcast import SimulatedDownloads, download_format, step_of
from wearfleet_cloud.federated.cohort import CohortPolicy
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_protos.codecs import FLOAT32, MOST_STEPS, UpdateCodec, frozen_bytes
from wearfleet_protos.errors import AggregationError, ConfigError
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import TensorRole

SPLITS = {name: splits(i, 45, 21) for i, name in enumerate(("anna", "ben", "cleo"))}
CLIENTS = tuple(SimulatedClient(n, s["train"], s["holdout"]) for n, s in SPLITS.items())
LOCAL = {"batch_size": 16, "learning_rate": 0.05}
LOSSY: dict[str, dict[str, object]] = {
    "fp16": {},
    "int8": {},
    "topk": {"downlink_fraction": 0.05, "downlink_warmup_rounds": 1},
    "sign": {},
}
FAST = ("int8", "topk")


def stacked(strategy) -> StackedClients:
    return StackedClients(strategy, strategy.network(model("cnn"), SEED), SEED, at_once=2)


def wired(strategy) -> WireClients:
    return WireClients(
        *compiled_plan(strategy, strategy.network(model("cnn"), SEED), seed=SEED), device_engine
    )


def outcome(
    downlink: str, runner=stacked, rounds: int = 3, name: str = "fedavg", cohort: int = 0, **more: object
) -> Outcome:
    strategy = create_strategy(name, {**LOCAL, "downlink": downlink, **LOSSY.get(downlink, {}), **more})
    simulation = Simulation(rounds, CohortPolicy(cohort), SEED)
    network = strategy.network(model("cnn"), SEED)
    return simulate(strategy, network, Population(CLIENTS), simulation, runner)


def plan_of(name: str, **options: object) -> Plan:
    strategy = create_strategy(name, {**LOCAL, **options})
    return compiled_plan(strategy, strategy.network(model("cnn"), SEED))[0]


def test_a_plan_declares_the_downlink_of_its_options() -> None:
    assert plan_of("fedavg").downlink is None
    assert plan_of("fedavg", downlink="difference").downlink == FLOAT32
    plan = plan_of(
        "fedavg", downlink="topk", downlink_fraction="0.02", downlink_warmup_rounds="3", codec="int8"
    )
    assert plan.downlink == UpdateCodec("topk", fraction=0.02, warmup_rounds=3)
    assert plan.upload.codec == UpdateCodec("int8")
    assert Plan.from_bytes(plan.to_bytes()) == plan


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        ("fedavg", {"downlink": "zip"}, "or whole, or difference"),
        ("fedavg", {"downlink": "float32"}, "exact difference"),
        ("fedavg", {"downlink": "topk", "downlink_fraction": "1.5"}, "fraction"),
        ("fedavg", {"downlink": "int8", "downlink_fraction": "0.4"}, "int8 has no downlink_fraction"),
        ("fedavg", {"downlink": "powersgd"}, "same bits"),
        ("fedavg", {"downlink_fraction": "0.1"}, "whole has no downlink_fraction"),
        ("fedap", {"downlink": "difference"}, "a model of its own"),
        ("fedhealth2", {"downlink": "int8", "reference": "none"}, "a model of its own"),
        ("epfl", {"downlink": "difference"}, "frozen tensors travel once in any case"),
        ("metafed", {"downlink": "int8"}, "once a lap"),
    ],
)
def test_options_that_make_no_sense_are_refused_when_the_job_is_made(strategy, options, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        create_strategy(strategy, options)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fedavg", {}),
        pytest.param("fedbn", {}, marks=pytest.mark.slow),
        pytest.param("scaffold", {}, marks=pytest.mark.slow),
        pytest.param("fedadam", {"server_learning_rate": 0.01}, marks=pytest.mark.slow),
        pytest.param("fedbuff", {"buffer_size": 2, "concurrency": 3}, marks=pytest.mark.slow),
    ],
)
def test_exact_differences_change_nothing_but_the_bytes(name: str, more: dict[str, object]) -> None:
    whole, exact = outcome("whole", name=name, **more), outcome("difference", name=name, **more)
    for tensor, array in whole.tensors.items():
        np.testing.assert_array_equal(exact.tensors[tensor], array)
    assert whole.modes == exact.modes
    assert exact.state.keys() == whole.state.keys(), "nothing is kept beside"
    assert exact.rounds[0].bytes_down == whole.rounds[0].bytes_down
    assert all(e.bytes_down < w.bytes_down for e, w in zip(exact.rounds[1:], whole.rounds[1:], strict=True))


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in LOSSY])
def test_a_lossy_downlink_is_the_same_stacked_and_on_the_wire(name: str) -> None:
    fast, real = outcome(name, stacked), outcome(name, wired)
    start, moved, apart = outcome("whole", rounds=1).tensors, 0.0, 0.0
    for tensor, array in real.tensors.items():
        apart += float(np.sum((fast.tensors[tensor] - array).astype(np.float64) ** 2))
        moved += float(np.sum((array - start[tensor]).astype(np.float64) ** 2))
    # as test_compression: where sums in another order put a number on another side of a border, another level is sent
    assert apart**0.5 < 0.03 * moved**0.5
    for a, b in zip(fast.rounds, real.rounds, strict=True):
        assert abs(a.bytes_down - b.bytes_down) <= 0.02 * b.bytes_down
    whole = outcome("whole", rounds=3)
    assert real.rounds[1].bytes_down < 0.6 * whole.rounds[1].bytes_down


def test_the_server_keeps_what_a_step_lost_and_shows_it_later() -> None:
    found = outcome("sign", rounds=4)
    exact = {n.removeprefix("broadcast/exact/"): a for n, a in found.state.items() if "/exact/" in n}
    assert exact
    assert step_of(found.state)
    specs = {s.name: s for s in stacked(create_strategy("fedavg", LOCAL)).specs}
    for name, array in exact.items():
        assert specs[name].role not in (TensorRole.NORM_STAT, TensorRole.COUNTER, TensorRole.FROZEN)
        assert specs[name].size_bytes >= 1024
        assert not np.array_equal(array, found.tensors[name])


def test_a_downlink_that_cannot_be_coded_says_what_to_do() -> None:
    with pytest.raises(AggregationError, match="smaller learning rate"):
        outcome("int8", learning_rate=1e30)


def test_bytes_go_by_what_each_client_holds() -> None:
    strategy = create_strategy("fedavg", {**LOCAL, "downlink": "difference"})
    form = download_format(strategy, stacked(strategy).specs, SEED)
    whole = sum(spec.size_bytes for spec in form.specs)
    values = {n: t.numpy().copy() for n, t in model("cnn").state_dict().items()}
    generator, downloads = np.random.default_rng(0), SimulatedDownloads(form)

    def moved(tensors):
        return {
            s.name: (tensors[s.name] + generator.normal(0, 1e-4, s.shape).astype(s.dtype)) for s in form.specs
        }

    versions = [values]
    downloads.publish(values, {})
    given = lambda *names: downloads.given(names, lambda _: versions[-1])  # noqa: E731
    assert given("anna", "ben") == 2 * whole
    assert given("anna") == 0, "a skipped round: she has it"
    for _ in range(3):
        versions.append(moved(versions[-1]))
        downloads.publish(versions[-1], {})
    assert given("anna") == len(form.join([form.exact(versions[0], versions[3])]))
    for _ in range(MOST_STEPS - 2):
        versions.append(moved(versions[-1]))
        downloads.publish(versions[-1], {})
    assert given("anna") == len(form.join([form.exact(versions[3], versions[-1])])) < whole
    assert given("ben") == whole, "nine versions ago is too long"
    assert given("cleo") == whole


@pytest.mark.parametrize("name", ["fedclip", pytest.param("zoopfl", marks=pytest.mark.slow)])
def test_frozen_tensors_travel_once_without_any_option(name: str) -> None:
    more = {"width": 6, "code_width": 2, "estimator": "random"} if name == "zoopfl" else {}
    strategy = create_strategy(name, {**LOCAL, **more})
    specs = stacked(strategy).specs
    sent = [s for s in specs if s.origin in ("global", "local") and not s.copy_of]
    frozen = sum(s.size_bytes for s in sent if s.role == TensorRole.FROZEN)
    assert frozen >= 1024
    found = outcome("whole", name=name, **more)
    first, *later = [r.bytes_down for r in found.rounds]
    assert first == len(CLIENTS) * sum(s.size_bytes for s in sent)
    assert all(after <= first - len(CLIENTS) * frozen + 64 * len(CLIENTS) for after in later)


def test_models_whose_frozen_part_is_small_are_sent_as_before() -> None:
    specs = stacked(create_strategy("fedavg", LOCAL)).specs
    values = {n: t.numpy() for n, t in model("cnn").state_dict().items()}
    assert frozen_bytes(specs, values) == b""
    assert len({r.bytes_down for r in outcome("whole").rounds}) == 1
