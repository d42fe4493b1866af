"""Codecs as options of a run: in the plan, in both simulations, and refused where they make no sense."""

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.edge_rounds import SEED
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.simulate import Outcome, Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_protos.codecs import FLOAT32, UpdateCodec, is_coded
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Plan
from wearfleet_protos.tensors import TensorRole

SPLITS = {name: splits(i, 45, 21) for i, name in enumerate(("anna", "ben", "cleo"))}
CLIENTS = tuple(SimulatedClient(n, s["train"], s["holdout"]) for n, s in SPLITS.items())
LOCAL = {"batch_size": 16, "learning_rate": 0.05}
CODECS: dict[str, dict[str, object]] = {
    "fp16": {},
    "bf16": {},
    "int8": {},
    "int4": {},
    "topk": {"codec_fraction": 0.05, "codec_warmup_rounds": 1},
    "randk": {"codec_fraction": 0.05},
    "sign": {},
    "powersgd": {"codec_rank": 2},
}


def plan_of(strategy: str, **options: object) -> Plan:
    return compiled_plan(create_strategy(strategy, {**LOCAL, **options}), model("cnn"))[0]


def test_a_plan_declares_the_codec_of_its_options() -> None:
    plan = plan_of("fedavg", codec="topk", codec_fraction="0.02", codec_warmup_rounds="3")
    assert plan.upload.codec == UpdateCodec("topk", fraction=0.02, warmup_rounds=3)
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan_of("fedavg", codec="powersgd").upload.codec == UpdateCodec("powersgd", rank=2)
    assert plan_of("fedavg", codec="topk").upload.codec == UpdateCodec("topk", 0.01, warmup_rounds=5)


def test_a_plan_without_a_codec_is_the_document_it_was() -> None:
    plan = plan_of("fedavg")
    assert plan.upload.codec == FLOAT32
    assert b'"codec":"float32"' in plan.to_bytes()


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        ("fedavg", {"codec": "zip"}, "topk"),
        ("fedavg", {"codec": "topk", "codec_fraction": "1.5"}, "fraction"),
        ("fedavg", {"codec": "int8", "codec_rank": "4"}, "int8 has no codec_rank"),
        ("fedavg", {"codec_fraction": "0.1"}, "float32 has no codec_fraction"),
        ("fedavg", {"codec": "powersgd", "codec_rank": "many"}, "codec_rank"),
        ("local", {"codec": "int8"}, "nothing is uploaded"),
    ],
)
def test_options_that_make_no_sense_are_refused_when_the_job_is_made(strategy, options, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        create_strategy(strategy, options)


def test_the_controls_of_scaffold_are_sent_as_they_are() -> None:
    plan = plan_of("scaffold", codec="sign")
    auxiliary = [spec for spec in plan.upload_specs() if spec.role == TensorRole.AUX]
    assert max(spec.size_bytes for spec in auxiliary) >= 1024
    assert not any(is_coded(spec) for spec in auxiliary)
    assert any(is_coded(spec) for spec in plan.upload_specs())


def outcome(codec: str, runner, rounds: int = 2) -> Outcome:
    strategy = create_strategy("fedavg", {**LOCAL, "codec": codec, **CODECS.get(codec, {})})
    return simulate(strategy, model("cnn"), Population(CLIENTS), Simulation(rounds, seed=SEED), runner)


def stacked(strategy) -> StackedClients:
    return StackedClients(strategy, model("cnn"), SEED, at_once=2)


def wired(strategy) -> WireClients:
    return WireClients(*compiled_plan(strategy, model("cnn"), seed=SEED), device_engine)


FAST = ("int8", "topk")


@pytest.mark.parametrize(
    "codec", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CODECS]
)
def test_stacked_clients_send_what_devices_send(codec: str) -> None:
    fast, real = outcome(codec, stacked), outcome(codec, wired)
    start = arrays(model("cnn"))
    apart = moved = 0.0
    for tensor, array in real.tensors.items():
        apart += float(np.sum((fast.tensors[tensor] - array).astype(np.float64) ** 2))
        moved += float(np.sum((array - start[tensor]).astype(np.float64) ** 2))
    # Sums in another order differ by 4e-5 of an update (test_simulation.py). Where a number is that close to the
    # border of two levels, of k largest ones, or of 0, the other one is sent: at most 7 * 4e-5 of the numbers by one
    # level of int4, a seventh of the largest, about 0.7 deviations: sqrt(3e-4) * 0.7 = 1.2 %; less for the others.
    assert apart**0.5 < 0.02 * moved**0.5
    for a, b in zip(fast.rounds, real.rounds, strict=True):
        # a place in topk that differs may change the length of its gap and of the next one
        assert abs(a.bytes_up - b.bytes_up) <= (12 if codec == "topk" else 0)
    assert real.rounds[0].bytes_up < outcome("float32", stacked, 1).rounds[0].bytes_up


def test_what_arrived_in_two_rounds_and_what_is_owed_are_both_updates() -> None:
    options = {**LOCAL, "codec": "randk", "codec_fraction": 0.1}
    coded, plain = stacked(create_strategy("fedavg", options)), stacked(create_strategy("fedavg", LOCAL))
    received, kept = [arrays(model("cnn"))] * len(CLIENTS), {}
    totals = [dict[str, float](), dict[str, float]()]
    for number in (1, 2):
        made = coded.run(number, CLIENTS, received, kept), plain.run(number, CLIENTS, received, {})
        kept = {r.client: r.kept for r in made[0]}
        for total, results in zip(totals, made, strict=True):
            for result in results:
                for name, array in result.update.items():
                    key = f"{result.client}/{name}"
                    total[key] = total.get(key, 0.0) + array.astype(np.float64)
    owed = {f"{c}/{n}": array for c, had in kept.items() for n, array in had.residual.owed.items()}
    assert len(owed) >= 2 * len(CLIENTS)
    for key, total in totals[1].items():
        # the two runners train alike; the sum with what is owed rounds twice a round, at most 2^-24 of the largest
        largest = float(np.abs(total).max()) + float(np.abs(owed.get(key, np.zeros(1))).max())
        np.testing.assert_allclose(totals[0][key] + owed.get(key, 0.0), total, atol=4 * 2.0**-24 * largest)
