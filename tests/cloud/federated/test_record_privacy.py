"""DP-SGD on the device: simulated = wire = a slow loop; batches, noise and refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from oracles.compiled import compiled_plan
from oracles.dp_sgd import dp_sgd, poisson_sgd, window_gradients
from oracles.edge_rounds import LIMITS, SEED
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.cli.simulate import device_engine
from wearfleet_cloud.federated import client_steps, create_strategy
from wearfleet_cloud.federated.client_program import ClientPhase
from wearfleet_cloud.federated.privacy.central import check_plan
from wearfleet_cloud.federated.privacy.record import bare_tensors, check_record
from wearfleet_cloud.federated.simulate import Population, Simulation, simulate
from wearfleet_cloud.federated.simulated_clients import SimulatedClient
from wearfleet_cloud.federated.stacked_clients import StackedClients, seeded_source
from wearfleet_cloud.federated.wire_clients import WireClients
from wearfleet_edge.trainer import TrainingData, run_plan, start_state, upload_tensors
from wearfleet_protos.errors import ConfigError

OPTIONS = {
    "dp": "record",
    "batch_size": 12,
    "learning_rate": 0.05,
    "clip": 0.7,
    "noise_multiplier": 0.8,
    "sampling_rate": 0.15,
    "record_steps": 4,
}
SIZES = {"anna": (45, 21), "ben": (20, 30), "cleo": (90, 9)}  # of cleo 80 windows take part
SPLITS = {name: splits(i, *SIZES[name]) for i, name in enumerate(SIZES)}
CLIENTS = tuple(SimulatedClient(n, s["train"], s["holdout"]) for n, s in SPLITS.items())


def made(name: str = "fedavg", **options: object):
    return create_strategy(name, {**OPTIONS, **options})


def on_device(strategy, network, name: str, source=None, tensors=None):
    """State after a round of a client on the agent's engine, and its update."""
    plan, graphs = compiled_plan(strategy, network, seed=SEED)
    known = arrays(network) if tensors is None else tensors
    given = {s.name: known.get(s.name, np.zeros(s.shape, s.dtype)) for s in plan.download_specs()}
    before = start_state(plan, given, {})
    data = TrainingData(SPLITS[name]["train"], SPLITS[name]["holdout"])
    result = run_plan(plan, graphs, before, data, round_number=1, limits=LIMITS, source=source)
    return result, upload_tensors(plan, before, result.state)


def oracle_of(strategy) -> dict[str, float]:
    record, local = strategy.local.record, strategy.local
    return {
        "rate": local.learning_rate,
        "sampling_rate": record.sampling_rate,
        "largest": local.batch_size,
        "steps": record.steps,
    }


def close(found, expected, start) -> None:
    """Relative to what moved: sums of up to 640 float32 products, 4 steps: 4 sqrt(640) 2^-24 = 6e-6, three times."""
    for name, array in expected.items():
        moved = np.linalg.norm(array - start[name])
        error = np.linalg.norm(found[name] - array)
        assert error <= 2e-5 * max(float(moved), 1e-3 * float(np.linalg.norm(array))), name


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["cnn-plain", "cnn"])
@pytest.mark.parametrize("name", ["anna", "cleo"])
def test_a_device_and_a_simulated_client_do_what_a_slow_loop_over_windows_does(
    name: str, backbone: str
) -> None:
    strategy, network = made(), model(backbone)
    start, source = arrays(network), lambda: seeded_source(SEED, 1, name)
    options = {"clip": 0.7, "noise_multiplier": 0.8, **oracle_of(strategy)}
    expected = dp_sgd(model(backbone), SPLITS[name]["train"], **options, source=source())
    found, _ = on_device(strategy, network, name, source())
    close(found.state, expected, start)
    chosen = [client for client in CLIENTS if client.name == name]
    (stacked,) = StackedClients(strategy, network, SEED).run(1, chosen, [start], {})
    close(start | {n: start[n] + a for n, a in stacked.update.items()}, expected, start)
    assert found.num_steps == stacked.num_steps == 4
    planted = dp_sgd(model(backbone), SPLITS[name]["train"], **options | {"clip": 0.71}, source=source())
    with pytest.raises(AssertionError):
        close(found.state, planted, start)


def test_large_parameters_that_are_updated_on_their_own_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy, network = made(), model("cnn-plain")
    together, _ = on_device(strategy, network, "anna", seeded_source(SEED, 1, "anna"))
    monkeypatch.setattr(client_steps, "_LARGE_PARAMETER", 200)  # the three biases are smaller
    apart, _ = on_device(strategy, network, "anna", seeded_source(SEED, 1, "anna"))
    close(apart.state, together.state, arrays(network))


def test_without_noise_and_with_a_clip_that_binds_nothing_it_is_plain_descent_on_the_same_batches() -> None:
    strategy, network = made(noise_multiplier=0.0, clip=1e6), model("cnn-plain")
    found, _ = on_device(strategy, network, "anna", seeded_source(SEED, 1, "anna"))
    expected = poisson_sgd(
        model("cnn-plain"),
        SPLITS["anna"]["train"],
        **oracle_of(strategy),
        source=seeded_source(SEED, 1, "anna"),
    )
    close(found.state, expected, arrays(network))


def test_clipping_is_by_window_and_one_window_moves_a_sum_by_no_more_than_the_clip() -> None:
    """Two devices whose recordings differ in one window, all windows in each of one step."""
    strategy = made(noise_multiplier=0.0, clip=0.05, sampling_rate=1.0, record_steps=1, batch_size=64)
    network, train = model("cnn-plain"), SPLITS["anna"]["train"]
    norms = np.linalg.norm(window_gradients(network.eval(), train, np.arange(45)), axis=1)
    assert (
        norms.min() > 0.05
    )  # so every window is clipped, and a mean that is clipped as a whole would be larger
    _, whole = on_device(strategy, network, "anna")
    sums = np.concatenate([a.reshape(-1) for a in whole.values()]) * 45 / 0.05
    assert np.linalg.norm(sums) <= 45 * 0.05 * (1 + 1e-5)
    x = train.x.copy()
    x[7] = 1e3 * x[8]
    changed = replace(train, x=x)
    SPLITS["odd"] = {"train": changed, "holdout": SPLITS["anna"]["holdout"]}
    _, other = on_device(strategy, network, "odd")
    del SPLITS["odd"]
    apart = np.concatenate([(other[n] - a).reshape(-1) for n, a in whole.items()]) * 45 / 0.05
    # rounding of 45 sums: the update is a float32 difference of weights near 1, 2^-24 sqrt(P) 45 / rate = 0.002
    assert 0.0 < np.linalg.norm(apart) <= 2 * 0.05 + 0.002


@pytest.mark.slow
def test_the_noise_has_the_size_of_the_options_and_is_new_every_time() -> None:
    quiet, loud = made(noise_multiplier=0.0, record_steps=1), made(noise_multiplier=3.0, record_steps=1)
    network = model("cnn-plain")
    _, bare = on_device(quiet, network, "anna", seeded_source(SEED, 1, "anna"))
    _, noisy = on_device(loud, network, "anna", seeded_source(SEED, 1, "anna"))
    noise = np.concatenate([(noisy[n] - a).reshape(-1) for n, a in bare.items()])
    sigma = 0.05 * 3.0 * 0.7 / (0.15 * 45)  # rate z C / (q N); standard error sigma / sqrt(2 n), five of them
    assert abs(noise.std() / sigma - 1.0) < 5.0 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5.0 * sigma / math.sqrt(noise.size)
    one, two = (on_device(loud, network, "anna")[1] for _ in range(2))
    assert not np.array_equal(one["head.weight"], two["head.weight"])


@pytest.mark.slow
def test_a_federation_over_the_wire_is_the_stacked_one_when_it_draws_the_same() -> None:
    strategy, network = made("fedprox", mu=0.1), model("cnn-plain")

    def engine(plan, graphs, tensors, stored, client, *, round_number):
        source = seeded_source(SEED, round_number, client.name)
        return device_engine(plan, graphs, tensors, stored, client, round_number=round_number, source=source)

    def run(runner):
        return simulate(strategy, network, Population(CLIENTS), Simulation(2, seed=SEED), runner).tensors

    stacked = run(lambda s: StackedClients(s, network, SEED))
    wired = run(lambda s: WireClients(*compiled_plan(s, network, seed=SEED), engine))
    close(wired, stacked, arrays(network))


@pytest.mark.parametrize("name", ["fedper", "ditto", "scaffold", "fednova", "fedadam", "fedbuff"])
def test_strategies_whose_updates_are_made_of_noised_steps_take_it(name: str) -> None:
    plan, _ = compiled_plan(made(name), model("cnn-plain"))
    assert [p.name for p in plan.phases if p.loop.sampling_rate] == ["train"]
    own = {s.name for s in plan.tensors if s.name.startswith(("personal/", "train_personal/"))}
    assert (
        bare_tensors(plan) == own
    )  # Ditto's personal model is trained without noise and stays on the device


def test_a_plan_in_which_windows_go_round_the_noise_is_refused() -> None:
    strategy = made("ditto")
    plan, _ = compiled_plan(strategy, model("cnn-plain"))
    check_plan(strategy, plan)
    groups = (*plan.upload.groups, next(s.group for s in plan.tensors if s.name.startswith("personal/")))
    roles = (*plan.upload.roles, next(s.role for s in plan.tensors if s.name.startswith("personal/")))
    local = tuple(replace(s, origin="copy") if s.origin == "local" else s for s in plan.tensors)
    leaky = replace(plan, tensors=local, upload=replace(plan.upload, groups=groups, roles=roles))
    with pytest.raises(ConfigError, match="otherwise than through noised steps"):
        check_record(leaky, strategy.privacy.record)


def test_what_is_kept_and_read_by_noised_steps_makes_them_bare() -> None:
    """A personal model that is trained without noise and read by the noised steps of the next round."""
    plan, _ = compiled_plan(made("ditto"), model("cnn-plain"))
    train = next(p for p in plan.phases if p.name == "train")
    personal = next(s.name for s in plan.tensors if s.name.startswith("personal/"))
    reads = replace(train.inputs[0], source=personal, input="added", kind="state")
    phases = tuple(replace(p, inputs=(*p.inputs, reads)) if p is train else p for p in plan.phases)
    with pytest.raises(ConfigError, match="otherwise than through noised steps"):
        check_record(replace(plan, phases=phases), made("ditto").privacy.record)


@pytest.mark.parametrize(
    "change",
    [{"clip": 0.6}, {"noise_multiplier": 0.7}, {"sampling_rate": 0.2}, {"record_steps": 5}, {"dp": "off"}],
)
def test_a_run_is_refused_whose_plan_has_other_steps_than_its_options(change: dict[str, object]) -> None:
    """The ledger would count on steps that no device makes."""
    strategy = made(**change)
    plan, _ = compiled_plan(made(), model("cnn-plain"))
    with pytest.raises(ConfigError, match="same --set"):
        check_plan(strategy, plan)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clip": "inf"}, "fixed, finite clip"),
        ({"adaptive_clip": "on"}, "fixed, finite clip"),
        ({"epochs": 2}, "set record_steps"),
        ({"max_steps": 3}, "set record_steps"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"record_steps": -1}, "record_steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made(**options)


@pytest.mark.slow
def test_the_device_compiles_nothing_but_standard_graphs_for_attention_too() -> None:
    result, update = on_device(
        made(record_steps=1), model("transformer"), "ben", seeded_source(SEED, 1, "ben")
    )
    assert result.num_steps == 1
    assert np.isfinite(update["head.weight"]).all()


def test_a_phase_says_how_much_noise_it_takes() -> None:
    program = made().client(model("cnn-plain"))
    sizes = {p.name: p.noise for p in program.phases if isinstance(p, ClientPhase)}
    assert sizes == {
        "evaluate_before": 0,
        "train": sum(p.numel() for p in model("cnn-plain").parameters()),
        "evaluate_after": 0,
    }
