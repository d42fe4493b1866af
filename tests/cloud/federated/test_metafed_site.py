"""A site's turn in a ring of federations: on the device's engine against plain torch; what is decided, and when."""

import numpy as np
import pytest
from oracles.edge_rounds import SEED, Federation
from oracles.metafed_sites import Site, SiteRing
from oracles.small_federation import arrays, model, splits
from wearfleet_cloud.federated import create_strategy
from wearfleet_cloud.federated.metafed import MetaFed
from wearfleet_cloud.federated.metafed_site import TURNS, MetaFedSite
from wearfleet_protos.errors import AggregationError, ConfigError

DEVICES = {"anna": splits(1, 45, 21), "ben": splits(2, 40, 30)}
RATE, BATCH, PASSES = 0.05, 16, 2
TEACHER = model("cnn", seed=3)


def site(**options: object) -> Federation:
    settings = {"learning_rate": RATE, "batch_size": BATCH, "passes": PASSES, **options}
    return Federation(create_strategy("metafed-site", settings), model("cnn"), DEVICES)


def taught(federation: Federation, stage: float, good: float) -> Federation:
    """The site with a teacher."""
    theirs = {f"teacher/{name}": array for name, array in arrays(TEACHER).items()}
    given = {"stage": np.float32(stage), "good_enough": np.float32(good), **theirs}
    federation.tensors = {name: given.get(name, array) for name, array in federation.tensors.items()}
    return federation


def turn(federation: Federation) -> Federation:
    assert isinstance(federation.strategy, MetaFedSite)
    for _ in range(federation.strategy.rounds):
        federation.round()
    return federation


@pytest.mark.parametrize(
    ("stage", "good", "share_norm"),
    [
        pytest.param(0, 0, "off", id="no teacher"),
        pytest.param(1, 0, "off", id="takes over"),
        pytest.param(1, 0, "on", id="takes norms over too", marks=pytest.mark.slow),
        pytest.param(1, 1, "off", id="distils"),
        pytest.param(2, 1, "off", id="personal", marks=pytest.mark.slow),
    ],
)
def test_a_turn_is_that_of_plain_torch(stage: int, good: int, share_norm: str) -> None:
    listening = {"threshold": 0.45, "personal_threshold": 0.1, "strength": 2.0}
    ours = turn(taught(site(share_norm=share_norm, **listening), stage, good))
    plain = SiteRing(
        {"site": Site(model("cnn"), {n: parts["train"] for n, parts in DEVICES.items()}, good=bool(good))},
        **listening,
        share_norm=share_norm == "on",
        passes=PASSES,
        rate=RATE,
        batch=BATCH,
        seed=lambda _: SEED,
    )
    expected = plain.turn(1, "site", TEACHER, stage).state_dict()
    assert float(ours.tensors["good_enough"]) == float(plain.sites["site"].good)
    assert float(ours.tensors[TURNS]) == 1.0
    for name, value in expected.items():
        if "num_batches" in name or name.startswith("standardise"):
            continue
        # 2 x 3 steps of float32 whose sums over 16 x 40 terms are ordered differently: 6 x sqrt(640) 2^-24 = 1e-5
        error = np.linalg.norm(ours.tensors[name] - value.numpy()) / max(np.linalg.norm(value.numpy()), 1e-3)
        assert error < 4e-5, name


@pytest.mark.slow
def test_devices_judge_train_and_judge_again() -> None:
    ours = taught(site(), 1.0, 0.0)
    before = dict(ours.tensors)
    results = ours.round()
    steps = [result.num_steps for result in results.values()]
    assert (
        sum(float(r.state["measured"]) for r in results.values()) == 9 + 8
    )  # every fifth of 45 and of 40 windows
    taken = [n for n in before if np.array_equal(ours.tensors[n], before.get("teacher/" + n, np.nan))]
    assert "head.weight" in taken
    trained = ours.round()
    assert all(r.num_steps > s for r, s in zip(trained.values(), steps, strict=True))
    assert float(next(iter(trained.values())).state["teacher_correct"]) == 0.0  # judged once only
    ours.round()
    closed = dict(ours.tensors)
    last = ours.round()
    assert [r.num_steps for r in last.values()] < [r.num_steps for r in trained.values()]
    assert all(np.array_equal(ours.tensors[n], closed[n]) for n in arrays(TEACHER))
    assert float(ours.tensors[TURNS]) == 1.0


@pytest.mark.slow
def test_a_teacher_that_is_much_worse_is_turned_away() -> None:
    fitted = turn(site(passes=8, learning_rate=0.2))
    trained = {name: fitted.tensors[name] for name in arrays(TEACHER)}
    poison = {
        f"teacher/{name}": -10.0 * array for name, array in trained.items() if array.dtype == np.float32
    }
    for gate, keeps in ((0.2, True), (1.0, False)):
        ours = site(gate=gate)
        given = {**trained, **poison, "stage": np.float32(1.0)}
        ours.tensors = {n: np.asarray(given.get(n, a), a.dtype) for n, a in ours.tensors.items()}
        ours.round()
        same = np.array_equal(ours.tensors["head.weight"], trained["head.weight"])
        assert same == keeps, gate


@pytest.mark.slow
def test_once_good_enough_always_good_enough() -> None:
    ours = turn(taught(site(threshold=1.5), 1.0, 1.0))
    assert float(ours.tensors["good_enough"]) == 1.0
    assert float(turn(taught(site(threshold=1.5), 1.0, 0.0)).tensors["good_enough"]) == 0.0


@pytest.mark.parametrize(("own", "theirs"), [(0.8, 0.8), (0.7, 0.9), (0.5, 0.95), (0.9, 0.8), (0.6, 0.45)])
def test_a_site_listens_as_strongly_as_a_device(own: float, theirs: float) -> None:
    import torch

    numbers = {
        "own_correct": own,
        "teacher_correct": theirs,
        "measured": 1.0,
        "stage": 2.0,
        "good_enough": 1.0,
    }
    device = MetaFed()._weight({n: torch.tensor(v) for n, v in {**numbers, "strength": 1.0}.items()})
    assert MetaFedSite()._personal_rate(own, theirs) == pytest.approx(float(device), rel=1e-5)


def test_a_round_without_updates_changes_nothing() -> None:
    ours = taught(site(), 1.0, 0.0)
    with pytest.raises(AggregationError, match="no updates"):
        ours.round(("anna",), lost=("anna",))
    assert ours.state == {}


@pytest.mark.parametrize("options", [{"passes": 0}, {"gate": 1.5}, {"threshold": -1}, {"share_norm": "yes"}])
def test_what_is_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create_strategy("metafed-site", options)
