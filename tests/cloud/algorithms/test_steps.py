"""Laws that relate the algorithms to each other and to plain training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_cloud.algorithms import ALGORITHMS, Algorithm, Batch, State, build_algorithm
from wearfleet_cloud.algorithms.base import descend
from wearfleet_cloud.algorithms.coral import Coral
from wearfleet_cloud.algorithms.erm import Erm
from wearfleet_cloud.algorithms.mixup import Mixup, mix
from wearfleet_cloud.training.optimisers import Adam, Sgd
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError

_CHOICES = [("erm", {}), ("mixup", {}), ("mixup", {"pairing": "domain"}), ("coral", {})]
_IDS = ["erm", "mixup", "mixup-domain", "coral"]


def _model(backbone: str = "cnn", seed: int = 0) -> Classifier:
    return build_classifier(ModelSpec(backbone, 3, 40, 4, kernel=5, feedforward=16), seed)


def _batch(domains: int = 3, windows: int = 6, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(domains, windows, 3, 40, generator=generator)
    return Batch(
        x + 0.3 * torch.arange(domains)[:, None, None, None],
        torch.randint(0, 4, (domains, windows), generator=generator),
    )


def _hyper(algorithm: Algorithm, **values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(v) for name, v in {"lr": 0.05, **algorithm.info.hyper, **values}.items()}


def _assert_states_equal(ours: State, other: State, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(tuple(ours), tuple(other), rtol=10 * tolerance, atol=tolerance)


def _frozen_norms(algorithm: Algorithm, model: Classifier) -> Algorithm:
    """The algorithm on a network whose batch normalisation uses its running statistics."""
    model.eval()
    return algorithm


def test_erm_is_plain_training_with_torch() -> None:
    model, batch = _model(), _batch()
    algorithm = build_algorithm("erm", model, Sgd(momentum=0.9))
    state = algorithm.init()
    reference = _model().train()
    optimiser = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        state, metrics = algorithm.step(state, batch, _hyper(algorithm), torch.tensor(0))
        loss = F.cross_entropy(reference(batch.x.flatten(0, 1)), batch.y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    tensors = {**state.params, **state.buffers}
    torch.testing.assert_close(tensors, dict(reference.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), _CHOICES, ids=_IDS)
@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_a_step_changes_nothing_it_was_given(name: str, options: dict, backbone: str) -> None:
    model = _model(backbone)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    algorithm = build_algorithm(name, model, Adam(), options)
    state, batch = algorithm.init(), _batch()
    copies = [{n: t.clone() for n, t in part.items()} for part in state]
    again = [algorithm.step(state, batch, _hyper(algorithm), torch.tensor(3)) for _ in range(2)]
    torch.testing.assert_close(list(state), copies, rtol=0.0, atol=0.0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0.0, atol=0.0)
    _assert_states_equal(again[0][0], again[1][0], 1e-7)
    assert not torch.equal(again[0][0].params["head.weight"], state.params["head.weight"])
    assert {"loss", "accuracy"} <= set(again[0][1])
    assert all(value.shape == () and not value.requires_grad for value in again[0][1].values())


@pytest.mark.parametrize(("name", "options"), _CHOICES, ids=_IDS)
@pytest.mark.parametrize("backbone", ["cnn", "transformer"])
def test_stacked_steps_equal_single_steps(name: str, options: dict, backbone: str) -> None:
    # Not Adam: it blows up the rounding of gradients that are zero, those of a bias before a normalisation.
    algorithms = [
        build_algorithm(name, _model(backbone, seed), Sgd(momentum=0.9), options) for seed in (0, 1)
    ]
    states = [algorithm.init() for algorithm in algorithms]
    hypers = [_hyper(algorithms[0], lr=rate) for rate in (0.01, 0.02)]
    batches, keys = [_batch(seed=5), _batch(seed=6)], torch.tensor([7, 8])

    def stack(*dicts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.stack([d[n] for d in dicts]) for n in dicts[0]}

    stacked_state = State(*(stack(*parts) for parts in zip(*states, strict=True)))
    x, y = (torch.stack(parts) for parts in list(zip(*batches, strict=True))[:2])

    def step(state: State, x: Tensor, y: Tensor, hyper: dict[str, Tensor], rng: Tensor):
        return algorithms[0].step(state, Batch(x, y), hyper, rng)

    after, metrics = vmap(step)(stacked_state, x, y, stack(*hypers), keys)
    for run in range(2):
        single, scalars = algorithms[run].step(states[run], batches[run], hypers[run], keys[run])
        mine = State(*({n: t[run] for n, t in part.items()} for part in after))
        for value, expected in ((mine.params, single.params), (mine.buffers, single.buffers)):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
        for label, value in scalars.items():
            torch.testing.assert_close(metrics[label][run], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), _CHOICES, ids=_IDS)
def test_a_traced_step_equals_the_step(name: str, options: dict) -> None:
    algorithm = build_algorithm(name, _model(), Sgd(momentum=0.9), options)
    state, hyper = algorithm.init(), _hyper(algorithm)

    def step(state: State, batch: Batch, rng: Tensor):
        return algorithm.step(state, batch, hyper, rng)

    weighted = Batch(*_batch()[:2], torch.ones(3, 6))
    traced = make_fx(step)(state, weighted, torch.tensor(1))
    other = Batch(*_batch(seed=9)[:2], torch.ones(3, 6))
    after, metrics = traced(state, other, torch.tensor(2))
    expected, expected_metrics = step(state, other, torch.tensor(2))
    _assert_states_equal(after, expected)
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["erm", "coral"])
def test_padding_does_not_matter(name: str) -> None:
    algorithm = build_algorithm(name, _model(), Sgd())
    short = _batch(windows=4)
    padded = Batch(
        torch.cat([short.x, torch.full((3, 2, 3, 40), 9.0)], 1),
        torch.cat([short.y, torch.zeros(3, 2, dtype=torch.int64)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).expand(3, 6),
    )
    state = algorithm.init()
    ours, metrics = algorithm.step(state, padded, _hyper(algorithm), torch.tensor(0))
    plain, expected = algorithm.step(state, short, _hyper(algorithm), torch.tensor(0))
    _assert_states_equal(ours, plain, 1e-4)
    torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-5)


def test_mixup_without_mixing_is_erm() -> None:
    model = _model()
    erm, mixup = Erm(model.train(), Sgd()), Mixup(model.train(), Sgd())
    state = erm.init()
    expected, plain = erm.step(state, _batch(), _hyper(erm), torch.tensor(1))
    # With a tiny concentration lam is 0 or 1: either way every window stays as it is.
    ours, metrics = mixup.step(state, _batch(), _hyper(mixup, alpha=1e-4), torch.tensor(1))
    _assert_states_equal(ours, expected)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_domain_mixup_of_equal_domains_without_mixing_is_erm_with_frozen_norms() -> None:
    """Each pair has a lam of its own, 0 or 1 here, so that only with equal domains each window counts once."""
    model, one = _model(), _batch(domains=1)
    mixup = _frozen_norms(Mixup(model, Sgd(), "domain"), model)
    erm = Erm(model, Sgd())
    state, batch = erm.init(), Batch(one.x.expand(3, -1, -1, -1), one.y.expand(3, -1))
    expected, plain = erm.step(state, one, _hyper(erm), torch.tensor(1))
    ours, metrics = mixup.step(state, batch, _hyper(mixup, alpha=1e-4), torch.tensor(1))
    _assert_states_equal(ours, expected)
    torch.testing.assert_close(metrics["loss"], plain["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", ["batch", "domain"])
def test_mixup_draws_anew_each_step(pairing: str) -> None:
    mixup = Mixup(_model().train(), Sgd(), pairing)
    state = mixup.init()
    hyper = _hyper(mixup, alpha=1.0)
    losses = {float(mixup.step(state, _batch(), hyper, torch.tensor(key))[1]["loss"]) for key in range(4)}
    assert len(losses) == 4


def test_mix_combines_windows_and_keeps_both_labels() -> None:
    ones, threes = (
        Batch(torch.ones(2, 1, 1, 2), torch.zeros(2, 1)),
        Batch(3 * torch.ones(2, 1, 1, 2), torch.ones(2, 1)),
    )
    mixed = mix(ones, threes, torch.tensor([1.0, 0.25]))
    assert mixed.x[:, 0, 0, 0].tolist() == [1.0, 2.5]
    assert mixed.y.tolist() == [[0.0], [0.0]]
    assert mixed.other.tolist() == [[1.0], [1.0]]
    assert mixed.weight is None
    weighted = mix(
        ones._replace(weight=torch.tensor([[1.0], [0.0]])),
        threes._replace(weight=torch.ones(2, 1)),
        mixed.lam,
    )
    assert weighted.weight is not None
    assert weighted.weight.tolist() == [[1.0], [0.0]]


def test_coral_without_penalty_is_domain_averaged_erm_with_frozen_norms() -> None:
    model = _model()
    coral = _frozen_norms(Coral(model, Sgd()), model)
    erm = Erm(model, Sgd())
    state = erm.init()
    expected, plain = erm.step(state, _batch(), _hyper(erm), torch.tensor(1))
    ours, metrics = coral.step(state, _batch(), _hyper(coral, gamma=0.0), torch.tensor(1))
    _assert_states_equal(ours, expected)
    torch.testing.assert_close(metrics["risk"], plain["loss"], rtol=1e-5, atol=1e-6)


def test_coral_normalises_every_domain_by_its_own_batch() -> None:
    model, batch = _model().train(), _batch()
    coral = Coral(model, Sgd())
    state = coral.init()
    after, metrics = coral.step(state, batch, _hyper(coral, gamma=0.0), torch.tensor(1))
    tensors = {**state.params, **state.buffers}
    risks = [
        F.cross_entropy(functional_call(model, tensors, (x,)), y)
        for x, y in zip(batch.x, batch.y, strict=True)
    ]
    torch.testing.assert_close(metrics["risk"], torch.stack(risks).mean().detach(), rtol=1e-5, atol=1e-6)
    assert int(after.buffers["backbone.norm1.num_batches_tracked"]) == 3
    torch.testing.assert_close(after.buffers, {n: tensors[n] for n in after.buffers}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["erm", "coral"])
def test_the_order_of_the_domains_does_not_change_the_loss(name: str) -> None:
    algorithm = build_algorithm(name, _model(), Sgd())
    state, batch = algorithm.init(), _batch(domains=4)
    order = torch.tensor([2, 0, 3, 1])
    losses = [
        algorithm.step(state, Batch(b.x, b.y), _hyper(algorithm), torch.tensor(1))
        for b in (batch, Batch(batch.x[order], batch.y[order]))
    ]
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[0][0].params, losses[1][0].params, rtol=1e-4, atol=1e-5)


def test_coral_makes_the_domains_more_alike() -> None:
    final = {}
    for gamma in (0.0, 10.0):
        coral = build_algorithm("coral", _model(), Adam())
        state = coral.init()
        for step in range(60):
            state, metrics = coral.step(
                state, _batch(windows=16), _hyper(coral, gamma=gamma, lr=0.003), torch.tensor(step)
            )
        final[gamma] = float(metrics["penalty"])
    assert final[10.0] < 0.5 * final[0.0]


def test_tape_and_transformed_gradients_are_equal() -> None:
    """The fast way to differentiate against the reference that torch.func transforms."""
    model, batch = _model().train(), _batch()
    erm = Erm(model, Sgd(momentum=0.5))
    state = erm.init()
    plain, _ = erm.step(state, batch, _hyper(erm), torch.tensor(0))
    one = State(*({n: t[None] for n, t in part.items()} for part in state))
    through, _ = vmap(lambda s: erm.step(s, batch, _hyper(erm), torch.tensor(0)))(one)
    _assert_states_equal(State(*({n: t[0] for n, t in part.items()} for part in through)), plain)


def test_a_step_works_where_gradients_are_switched_off() -> None:
    def objective(params: dict[str, Tensor], buffers: dict[str, Tensor]):
        return params["w"].square().sum(), ({}, buffers)

    state = State({"w": torch.tensor([2.0])}, {}, {}, {})
    with torch.no_grad():
        after, metrics = descend(objective, state, Sgd(), torch.tensor(0.25))
    assert (after.params["w"].tolist(), float(metrics["loss"])) == ([1.0], 4.0)


def test_registry_names_itself_and_says_what_it_knows() -> None:
    assert all(kind.info.name == name for name, kind in ALGORITHMS.items())
    with pytest.raises(ConfigError, match="unknown algorithm 'emr'; known: erm, mixup, coral"):
        build_algorithm("emr", _model(), Sgd())
    with pytest.raises(ConfigError, match=r"pairing = batch \| domain"):
        build_algorithm("mixup", _model(), Sgd(), {"pairing": "pairs"})
    with pytest.raises(ConfigError, match="its options: none"):
        build_algorithm("erm", _model(), Sgd(), {"pairing": "batch"})
