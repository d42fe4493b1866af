"""The Transformer of several kinds of sensor: one encoder each, late fusion, and sensors that are not there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from wearfleet_models import Classifier, ModelSpec, build_classifier
from wearfleet_protos.errors import ConfigError

KINDS = (0, 1, 0, 2, 1, 1, 2)
CHANNELS_OF = {0: [0, 2], 1: [1, 4, 5], 2: [3, 6]}
FEATURES_OF = {0: slice(0, 128), 1: slice(128, 320), 2: slice(320, 448)}


def spec(kinds: tuple[int, ...] = KINDS, **settings: int) -> ModelSpec:
    return ModelSpec(
        "multimodal-transformer", len(KINDS), 40, 4, feedforward=32, modalities=kinds, **settings
    )


def network(**settings: int) -> Classifier:
    """Standardised by numbers that are not zero and one, as a trained network is."""
    made = build_classifier(spec(**settings), seed=1)
    made.standardise.mean.copy_(torch.linspace(-3.0, 2.0, len(KINDS)))
    made.standardise.std.copy_(torch.linspace(0.3, 4.0, len(KINDS)))
    return made.eval()


def windows(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, len(KINDS), 40, generator=torch.Generator().manual_seed(seed))


def without(x: Tensor, *kinds: int, number: float = 0.0) -> Tensor:
    """The windows with channels of some kinds at one number."""
    x = x.clone()
    for kind in kinds:
        x[:, CHANNELS_OF[kind]] = number
    return x


def test_each_kind_of_sensor_has_the_features_of_a_transformer_of_its_own() -> None:
    model, x = network(), windows()
    standard = model.standardise(x)
    for kind, channels in CHANNELS_OF.items():
        alone = model.backbone.encoders[kind](standard[:, channels])
        torch.testing.assert_close(model.features(x)[:, FEATURES_OF[kind]], alone, rtol=0, atol=0)


def test_with_one_kind_it_is_the_transformer() -> None:
    plain = build_classifier(ModelSpec("transformer", 7, 40, 4, feedforward=32), seed=2).train()
    twin = build_classifier(spec(kinds=()), seed=2).train()
    assert [t.shape for t in twin.state_dict().values()] == [t.shape for t in plain.state_dict().values()]
    x, key = windows(), torch.tensor(3)
    torch.testing.assert_close(twin(x, None, key), plain(x, None, key), rtol=0, atol=0)


def test_what_happens_in_one_sensor_does_not_show_in_the_features_of_another() -> None:
    model, x = network(), windows()
    before = model.features(x)
    for kind, own in FEATURES_OF.items():
        other = x.clone()
        other[:, CHANNELS_OF[kind]] = windows(seed=2)[:, CHANNELS_OF[kind]]
        changed = (model.features(other) != before).any(dim=0)
        assert bool(changed[own].any())
        changed[own] = False
        assert not bool(changed.any())


@pytest.mark.parametrize("number", [0.0, -7.3, 1e6])
@pytest.mark.parametrize("gone", [(0,), (2,), (0, 1)])
def test_a_sensor_that_stands_still_is_left_out_and_the_others_are_scaled(
    gone: tuple[int, ...], number: float
) -> None:
    model, x = network(), windows()
    before, after = model.features(x), model.features(without(x, *gone, number=number))
    factor = 3 / (3 - len(gone))
    for kind, own in FEATURES_OF.items():
        # one multiplication in float32: half a unit in the last place
        expected = torch.zeros_like(before[:, own]) if kind in gone else before[:, own] * factor
        torch.testing.assert_close(after[:, own], expected, rtol=2**-23, atol=0)


def test_windows_of_a_batch_may_lack_different_sensors() -> None:
    model, x = network(), windows(3)
    mixed = torch.cat([x[:1], without(x[1:2], 1), without(x[2:], 0, 2)])
    one_by_one = torch.cat([model(window[None]) for window in mixed])
    torch.testing.assert_close(model(mixed), one_by_one, rtol=1e-5, atol=1e-5)  # as for every backbone


def test_a_window_without_any_sensor_gets_the_bias_of_the_head() -> None:
    model = network()
    logits = model(without(windows(2), 0, 1, 2))
    torch.testing.assert_close(logits, model.head.bias.expand(2, -1), rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_a_sensor_that_is_not_there_gets_no_gradient_and_the_others_one(settings: dict[str, int]) -> None:
    model = network(**settings).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("query_b", "value_b")):
            torch.nn.init.normal_(parameter)  # at zero, it would give A no gradient anyway
    logits = model(without(windows(), 1), None, torch.tensor(4))
    torch.nn.functional.cross_entropy(logits, torch.arange(5) % 4).backward()
    for kind, encoder in enumerate(model.backbone.encoders):
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any()) == (kind != 1), (kind, name)


def test_a_sensor_of_one_channel_learns_through_values_alone() -> None:
    model = build_classifier(spec(kinds=(0, 0, 0, 0, 0, 0, 1), lora_rank=2), seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith(("query_b", "value_b")):
            torch.nn.init.normal_(parameter)
    model(windows()).square().sum().backward()
    for layer in model.backbone.encoders[1].layers:  # one token: its weight is 1, whatever it asks
        assert not bool((layer.qkv.query_a.grad != 0).any())
        assert bool((layer.qkv.value_a.grad != 0).any())


def test_dropout_of_each_encoder_is_drawn_anew() -> None:
    x = torch.ones(64, 1, 40)
    x[..., ::2] = -1.0
    model = build_classifier(ModelSpec("multimodal-transformer", 2, 40, 4, feedforward=32, modalities=(0, 1)))
    first, second = model.backbone.encoders
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))  # without a key nothing is dropped
    assert not torch.equal(first(x, None, torch.tensor(1)), second(x, None, torch.tensor(1)))


def test_a_specification_survives_json() -> None:
    text = json.dumps(spec().to_dict())
    assert ModelSpec(**json.loads(text)) == spec()
    assert hash(ModelSpec(**json.loads(text))) == hash(spec())


@pytest.mark.parametrize(
    ("backbone", "kinds", "message"),
    [
        ("transformer", KINDS, "belong to multimodal-transformer, not to transformer"),
        ("multimodal-transformer", (0, 1), "each of 7 channels"),
        ("multimodal-transformer", (0, 0, 0, 2, 2, 3, 3), "without gaps"),
        ("multimodal-transformer", (1, 1, 1, 2, 2, 3, 3), "without gaps"),
        ("multimodal-transformer", (-1, 0, 0, 0, 0, 0, 0), "without gaps"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(backbone: str, kinds: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(backbone, 7, 40, 4, modalities=kinds)
