"""Backbones and the classifier: shapes, determinism, batch independence."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_models import ModelSpec, build_classifier
from wearfleet_models.backbones import Transformer
from wearfleet_protos.errors import ConfigError

# specs/ood.md, table 1.4: task, channels, window, kernel, number of features
_TABLE = [
    ("dsads person", 45, 125, 9, 800),
    ("dsads position", 9, 125, 9, 800),
    ("usc", 6, 200, 6, 1472),
    ("pamap position", 9, 200, 9, 1408),
    ("har", 6, 128, 9, 832),
    ("dsads device", 15, 125, 5, 896),
    ("pamap person", 27, 200, 9, 1408),
    ("cross-dataset", 6, 50, 6, 256),
    ("emg / wesad", 8, 200, 9, 1408),
    ("opp", 45, 200, 9, 1408),
    ("realworld", 9, 200, 9, 1408),
    ("shemg", 8, 100, 5, 704),
    ("loemg", 8, 500, 9, 3808),
]


@pytest.mark.parametrize(("task", "channels", "window", "kernel", "features"), _TABLE)
def test_cnn_has_the_published_number_of_features(
    task: str, channels: int, window: int, kernel: int, features: int
) -> None:
    model = build_classifier(ModelSpec("cnn", channels, window, 5, kernel=kernel)).eval()
    assert model.features(torch.randn(2, channels, window)).shape == (2, features), task


def test_cnn_of_dsads_has_the_published_number_of_parameters() -> None:
    model = build_classifier(ModelSpec("cnn", 45, 125, 19))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.head)]
    assert counts == [11_232, 15_219]


@pytest.mark.parametrize(("channels", "features"), [(45, 2880), (6, 384), (27, 1728), (8, 512)])
def test_transformer_has_the_published_number_of_features(channels: int, features: int) -> None:
    model = build_classifier(ModelSpec("transformer", channels, 128, 5, feedforward=32)).eval()
    assert model.features(torch.randn(2, channels, 128)).shape == (2, features)


def _specs() -> list[ModelSpec]:
    return [ModelSpec("cnn", 6, 64, 4), ModelSpec("transformer", 6, 64, 4, feedforward=32)]


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.backbone)
def test_evaluation_of_a_window_does_not_depend_on_its_batch(spec: ModelSpec) -> None:
    model = build_classifier(spec).eval()
    x = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.cat([model(window[None]) for window in x])
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.backbone)
def test_same_spec_and_seed_give_the_same_weights_and_leave_the_global_generator_alone(
    spec: ModelSpec,
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = build_classifier(spec, 3), build_classifier(spec, 3), build_classifier(spec, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0.0, atol=0.0)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.backbone)
def test_windows_of_weight_zero_do_not_change_the_others(spec: ModelSpec) -> None:
    model = build_classifier(spec).train()
    x = torch.randn(6, 6, 64, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    padded = functional_call(model, dict(tensors), (torch.cat([x[:3], 50.0 * x[3:]]), weight))
    short = functional_call(model, dict(tensors), (x[:3], torch.ones(3)))
    torch.testing.assert_close(padded[:3], short, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_transformer_follows_the_key() -> None:
    model = build_classifier(ModelSpec("transformer", 6, 64, 4, feedforward=32)).train()
    x = torch.randn(3, 6, 64)
    assert torch.equal(model(x, None, torch.tensor(1)), model(x, None, torch.tensor(1)))
    assert not torch.equal(model(x, None, torch.tensor(1)), model(x, None, torch.tensor(2)))


def test_transformer_tells_channels_apart() -> None:
    model = build_classifier(ModelSpec("transformer", 6, 64, 4, feedforward=32)).eval()
    x = torch.randn(1, 6, 64)
    tokens, swapped = (model.features(v).reshape(6, 64) for v in (x, x.flip(1)))
    assert not torch.allclose(tokens, swapped.flip(0), atol=1e-3)


@pytest.mark.parametrize("spec", _specs(), ids=lambda spec: spec.backbone)
def test_training_pass_can_be_traced(spec: ModelSpec) -> None:
    model = build_classifier(spec).train()

    def run(x: torch.Tensor, weight: torch.Tensor, rng: torch.Tensor) -> torch.Tensor:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return functional_call(model, tensors, (x, weight, rng))

    x, weight = torch.randn(3, 6, 64), torch.ones(3)
    traced = make_fx(run)(torch.randn(3, 6, 64), torch.ones(3), torch.tensor(1))
    expected = run(x, weight, torch.tensor(2))
    torch.testing.assert_close(traced(x, weight, torch.tensor(2)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("lstm", 6, 64, 4), "unknown backbone 'lstm'"),
        (("cnn", 6, 27, 4), "27 samples is too short"),
        (("cnn", 0, 64, 4), "channels"),
        (("cnn", 6, 64.0, 4), "window"),
    ],
)
def test_an_impossible_model_is_refused_with_the_reason(settings: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_classifier(ModelSpec(*settings))


def test_shortest_possible_window_works() -> None:
    assert build_classifier(ModelSpec("cnn", 2, 28, 3)).eval()(torch.randn(1, 2, 28)).shape == (1, 3)


def test_transformer_width_must_be_a_multiple_of_the_heads() -> None:
    with pytest.raises(ConfigError, match="multiple of its heads"):
        Transformer(6, 64, width=60, heads=8)
