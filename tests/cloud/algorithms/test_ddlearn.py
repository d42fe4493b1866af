"""DDLearn: its loss written out, what it augments in which mode, and the networks of the original paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from algorithm_cases import CLASSES, DOMAINS, batch, build, hyper, step
from torch import Tensor, nn
from torch.func import functional_call
from wearfleet_cloud.algorithms import Algorithm, Batch, State, network_of
from wearfleet_cloud.algorithms.ddlearn import DDLearn, diversity_risk
from wearfleet_cloud.data.augment import augment, jitter
from wearfleet_cloud.training.optimisers import Sgd
from wearfleet_models import ModelSpec, build_classifier, randomness

_FORMS = [
    {"form": "harood", "mode": "corrected"},
    {"form": "harood", "mode": "strict"},
    {"form": "original", "mode": "corrected"},
    {"form": "original", "mode": "strict"},
]


def _build(options: dict[str, str]) -> DDLearn:
    algorithm = build("ddlearn", Sgd(), options)
    assert isinstance(algorithm, DDLearn)
    algorithm.model.standardise.std.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return algorithm


def _augmented(algorithm: DDLearn, given: Batch, key: Tensor) -> tuple[Tensor, Tensor]:
    """The augmented windows of a step and the numbers of their transforms, by the public functions."""
    x = given.x[:, 6:].flatten(0, 1)
    std = algorithm.model.standardise.std
    noise = 0.05 * (std if algorithm.mode == "corrected" else torch.ones(3))
    if algorithm.mode == "strict" and algorithm.form == "harood":
        return jitter(x, key, noise), torch.zeros(len(x), dtype=torch.int64)
    which = randomness.integers(key, 1_000, (len(x),), torch.tensor(7))
    return augment(x, which, key, noise), which


def _features(algorithm: Algorithm, state: State, x: Tensor) -> Tensor:
    own = {name: t.clone() for name, t in (*state.params.items(), *state.buffers.items()) if "/" not in name}
    model = algorithm.model
    net = build_classifier(model.spec).train()
    net.load_state_dict(own)
    return net.features(x).detach()


def _contrast(z: Tensor, y: Tensor, mode: str) -> float:
    """Row by row in float64 (specs/ood.md 4.5)."""
    z = F.normalize(z.double(), dim=1) if mode == "corrected" else z.double()
    similar = z @ z.T / 0.07
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if y[j] == y[i]]
        if mode == "corrected":
            rest = torch.logsumexp(similar[i, others], 0)
            if positives:
                terms.append(float(rest - similar[i, positives].mean()))
        else:
            top = similar[i].max()
            rest = torch.log((similar[i, others] - top).exp().sum() + 1e-6) + top
            terms.append(float(sum(rest - similar[i, j] for j in positives)) / (len(positives) + 1e-6))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("options", _FORMS, ids=lambda o: "-".join(o.values()))
def test_the_loss_is_the_published_sum_of_four(options: dict[str, str]) -> None:
    algorithm = _build(options)
    state, given, key = algorithm.init(), batch(algorithm), torch.tensor(3)
    weights = {"self_weight": 0.5, "diversity_weight": 2.0, "contrast_weight": 0.25}
    _, metrics = algorithm.step(state, given, hyper(algorithm, **weights), key)
    changed, which = _augmented(algorithm, given, key)
    f = _features(algorithm, state, given.x[:, :6].flatten(0, 1))
    fa = _features(algorithm, state, changed)
    z, y = torch.cat((f, fa)), torch.cat((given.y[:, :6].flatten(), given.y[:, 6:].flatten()))
    params = state.params
    told = z @ params["transform/weight"].T + params["transform/bias"]
    assert told.shape[1] == 8
    expected = {
        "risk": F.cross_entropy(z @ params["head.weight"].T + params["head.bias"], y),
        "transform_risk": F.cross_entropy(told, torch.cat((torch.full_like(which, 7), which))),
        "diversity": diversity_risk(f, fa, key),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-5)
    # strict similarities reach thousands, whose difference keeps float32 to a few thousandths
    assert float(metrics["contrast"]) == pytest.approx(_contrast(z, y, algorithm.mode), rel=1e-3, abs=5e-3)
    total = metrics["risk"] + 0.5 * metrics["transform_risk"] + 2.0 * metrics["diversity"]
    torch.testing.assert_close(metrics["loss"], total + 0.25 * metrics["contrast"], rtol=1e-5, atol=1e-5)


def test_random_projection_is_torchs_network_with_its_usual_initial_weights() -> None:
    """The risk against a module made of the same numbers, and the range of these numbers."""
    generator = torch.Generator().manual_seed(1)
    raw, changed = torch.randn(5, 9, generator=generator), torch.randn(7, 9, generator=generator)
    key, net = torch.tensor(8), nn.Sequential(nn.Linear(9, 60), nn.ReLU(), nn.Linear(60, 1), nn.Sigmoid())
    drawn = {}
    for number, (name, tensor) in enumerate(net.state_dict().items()):
        bound = (9 if number < 2 else 60) ** -0.5
        shape = tuple(tensor.shape) if number < 2 else ((60,), ())[number - 2]
        drawn[name] = (bound * (2.0 * randomness.uniform(key, 1_002 + number, shape) - 1.0)).reshape(
            tensor.shape
        )
        assert float(drawn[name].abs().max()) <= bound
    scores = functional_call(net, drawn, (raw,)), functional_call(net, drawn, (changed,))
    expected = F.binary_cross_entropy(scores[0], torch.ones(5, 1))
    expected = expected + F.binary_cross_entropy(scores[1], torch.zeros(7, 1))
    torch.testing.assert_close(diversity_risk(raw, changed, key), expected, rtol=1e-5, atol=1e-6)


def test_the_projection_is_new_in_every_step_and_never_trained() -> None:
    """P8."""
    algorithm = _build({})
    state = algorithm.init()
    assert not [n for n in state.params if "/" in n and not n.startswith("transform/")]
    one = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    assert len({float(diversity_risk(one, 2.0 * one, torch.tensor(key))) for key in range(4)}) == 4


def test_diversity_pulls_equal_features_of_raw_and_augmented_windows_into_opposite_directions() -> None:
    z = torch.randn(32, 16, generator=torch.Generator().manual_seed(3))
    both = torch.stack((z, z)).requires_grad_()
    slope = torch.autograd.grad(diversity_risk(both[0], both[1], torch.tensor(1)), both)[0]
    torch.testing.assert_close(
        torch.cosine_similarity(slope[0], slope[1], dim=1), -torch.ones(32), rtol=1e-5, atol=0.0
    )


def test_transforms_are_drawn_evenly_except_in_harood_strict() -> None:
    """P1: its published code only ever draws the jitter."""
    for options in _FORMS:
        algorithm = _build(options)
        given = batch(algorithm, windows=400)
        halves = algorithm._halves(given, algorithm.model.standardise.std, torch.tensor(1))
        raw, changed = halves.transform[: DOMAINS * 400], halves.transform[DOMAINS * 400 :]
        assert bool((raw == 7).all())
        counts = changed.bincount(minlength=8).tolist()
        if options == {"form": "harood", "mode": "strict"}:
            assert counts == [DOMAINS * 400, *[0] * 7]
            noise = (halves.augmented - given.x[:, 400:].flatten(0, 1)).std(dim=(0, 2))
            torch.testing.assert_close(noise, torch.full((3,), 0.05), rtol=0.05, atol=0.0)
        else:  # 1 200 over 7: 171 each, standard deviation 12; five of them
            assert counts[7] == 0
            assert all(abs(count - 171) < 61 for count in counts[:7])


def test_original_form_trains_the_network_of_the_paper() -> None:
    original = {"form": "original"}
    for channels, window, features in ((45, 125, 800), (27, 512, 3904)):
        spec = network_of("ddlearn", ModelSpec("cnn", channels, window, CLASSES), 3, original)
        model = build_classifier(spec)
        assert (spec.backbone, model.backbone.num_features, model.head.in_features) == (
            "cnn-plain",
            features,
            64,
        )
    spec = network_of("ddlearn", ModelSpec("cnn-plain-3", 6, 500, CLASSES, kernel=6), 3, original)
    model = build_classifier(spec)
    assert (model.backbone.num_features, model.head.in_features) == (3712, 128)
    assert network_of("ddlearn", ModelSpec("cnn", 6, 128, CLASSES), 3).neck == "none"


def test_windows_of_weight_zero_are_absent() -> None:
    """In the original form, whose strict jitter draws by place: the padding stands at the end of each half."""
    algorithm = _build({"form": "original"})
    state, given = algorithm.init(), batch(algorithm)
    weight = torch.ones(DOMAINS, 12)
    weight[-1, 5] = weight[-1, 11] = 0.0
    x = given.x.clone()
    x[-1, 5], x[-1, 11] = 50.0, -50.0
    kept, metrics = step(algorithm, state, Batch(given.x, given.y, weight), 1)
    spoilt, others = step(algorithm, state, Batch(x, given.y, weight), 1)
    torch.testing.assert_close(metrics["loss"], others["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.params, spoilt.params, rtol=1e-4, atol=1e-5)
