"""Backbones and the classifier: shapes, determinism, batch independence."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from wearfleet_models import BACKBONES, NECKS, ModelSpec, build_classifier
from wearfleet_models.backbones import Transformer
from wearfleet_models.backbones.attention import attend
from wearfleet_protos.errors import ConfigError

# acceptance test T14; specs/ood.md, table 1.4: task, channels, window, kernel, number of features
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


@pytest.mark.parametrize(
    ("backbone", "window", "features"), [("cnn-small", 200, 16 * 96), ("cnn-large", 200, 32 * 5)]
)
def test_small_and_large_cnn_have_the_number_of_features_that_the_benchmark_states(
    backbone: str, window: int, features: int
) -> None:
    model = build_classifier(ModelSpec(backbone, 8, window, 6)).eval()
    assert model.features(torch.randn(2, 8, window)).shape == (2, features)


@pytest.mark.parametrize(
    ("backbone", "channels", "window", "kernel", "features"),
    [("cnn-plain", 45, 125, 9, 800), ("cnn-plain", 27, 512, 9, 3904), ("cnn-plain-3", 6, 500, 6, 3712)],
)
def test_cnn_of_ddlearn_has_the_published_number_of_features_and_no_normalisation(
    backbone: str, channels: int, window: int, kernel: int, features: int
) -> None:
    model = build_classifier(ModelSpec(backbone, channels, window, 5, kernel=kernel)).eval()
    assert model.features(torch.randn(2, channels, window)).shape == (2, features)
    assert not list(model.backbone.buffers())


@pytest.mark.parametrize("window", [50, 125, 128, 200])
@pytest.mark.parametrize(
    ("backbone", "features"), [("patch-transformer", 64), ("deep-conv-lstm", 128), ("resnet", 128)]
)
def test_features_of_the_others_do_not_depend_on_the_window(
    backbone: str, window: int, features: int
) -> None:
    model = build_classifier(ModelSpec(backbone, 6, window, 4)).eval()
    assert model.features(torch.randn(2, 6, window)).shape == (2, features)


def _specs() -> list[ModelSpec]:
    bare = [ModelSpec(name, 6, 64, 4, kernel=3, feedforward=32) for name in BACKBONES]
    necks = [
        ModelSpec("cnn", 6, 64, 4, neck=name, neck_width=8, domains=3) for name in NECKS if name != "none"
    ]
    sensors = ModelSpec("multimodal-transformer", 6, 64, 4, feedforward=32, modalities=(0, 1, 1, 0, 2, 1))
    return [*bare, *necks, sensors]


def _id(spec: ModelSpec) -> str:
    return f"{spec.backbone}-{spec.neck}" + ("-sensors" if spec.modalities else "")


@pytest.mark.parametrize("spec", _specs(), ids=_id)
def test_evaluation_of_a_window_does_not_depend_on_its_batch(spec: ModelSpec) -> None:
    model = build_classifier(spec).eval()
    x = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.cat([model(window[None]) for window in x])
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", _specs(), ids=_id)
def test_same_spec_and_seed_give_the_same_weights_and_leave_the_global_generator_alone(
    spec: ModelSpec,
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = build_classifier(spec, 3), build_classifier(spec, 3), build_classifier(spec, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0.0, atol=0.0)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("spec", _specs(), ids=_id)
def test_windows_of_weight_zero_do_not_change_the_others(spec: ModelSpec) -> None:
    model = build_classifier(spec).train()
    x = torch.randn(6, 6, 64, generator=torch.Generator().manual_seed(2))
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    padded = functional_call(model, dict(tensors), (torch.cat([x[:3], 50.0 * x[3:]]), weight))
    short = functional_call(model, dict(tensors), (x[:3], torch.ones(3)))
    torch.testing.assert_close(padded[:3], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spec", _specs(), ids=_id)
def test_stacked_gradients_and_statistics_equal_those_of_single_models(
    spec: ModelSpec, weighted: bool
) -> None:
    models = [build_classifier(spec, seed).double().train() for seed in (0, 1)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 6, 64, generator=generator, dtype=torch.float64)
    weight = torch.rand(2, 5, generator=generator, dtype=torch.float64) if weighted else torch.ones(2, 0)
    keys = torch.tensor([7, 8])

    def loss(
        params: dict, buffers: dict, x: torch.Tensor, weight: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        tensors = {**params, **buffers}
        logits = functional_call(models[0], tensors, (x, weight if weighted else None, key))
        return logits.square().mean(), {name: tensors[name] for name in buffers}

    params = [{n: p.detach() for n, p in model.named_parameters()} for model in models]
    buffers = [dict(model.named_buffers()) for model in models]

    def stack(parts: list[dict]) -> dict:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    both = vmap(grad(loss, has_aux=True))(stack(params), stack(buffers), x, weight, keys)
    for run in range(2):
        single = grad(loss, has_aux=True)(params[run], buffers[run], x[run], weight[run], keys[run])
        mine = tuple({name: tensor[run] for name, tensor in part.items()} for part in both)
        # float64 sums of at most 10^4 terms of order 1 in another order: far below 1e-9
        torch.testing.assert_close(mine, single, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_learns_a_small_task(name: str) -> None:
    # guessing gives 0.25; every backbone was at 1.0 when this was written
    generator = torch.Generator().manual_seed(4)
    y = torch.arange(64) % 4
    phase = torch.rand(64, 1, 1, generator=generator)
    x = torch.sin(2 * torch.pi * (2 * (1 + y)[:, None, None] * torch.arange(48) / 48.0 + phase))
    x = x.expand(-1, 2, -1) + 0.1 * torch.randn(64, 2, 48, generator=generator)
    model = build_classifier(ModelSpec(name, 2, 48, 4, kernel=3, feedforward=32), 1).train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(80 if name in ("cnn-small", "deep-conv-lstm") else 40):  # the slow learners
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x, None, torch.tensor(step)), y).backward()
        optimiser.step()
    assert float((model.eval()(x).argmax(1) == y).float().mean()) > 0.9


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


@pytest.mark.slow
@pytest.mark.parametrize("spec", _specs(), ids=_id)
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
        (("lstm", 6, 64, 4), "unknown backbone 'lstm'; known: cnn, cnn-small, cnn-large, cnn-plain"),
        (("cnn", 6, 27, 4), "27 samples is too short for kernel 9; it needs 28"),
        (("cnn-small", 6, 9, 4), "it needs 10"),
        (("cnn-large", 6, 135, 4), "it needs 136"),
        (("patch-transformer", 6, 17, 4), "it needs 18"),
        (("deep-conv-lstm", 6, 16, 4), "it needs 17"),
        (("multimodal-transformer", 6, 1, 4), "it needs 2"),
        (("lag-cnn", 6, 100, 4), "100 samples is cut into 10 patches: .* needs 13"),
        (("cnn", 0, 64, 4), "channels"),
        (("cnn", 6, 64.0, 4), "window"),
    ],
)
def test_an_impossible_model_is_refused_with_the_reason(settings: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_classifier(ModelSpec(*settings))


@pytest.mark.parametrize(
    ("backbone", "window"),
    [
        ("cnn", 28),
        ("cnn-small", 10),
        ("cnn-large", 136),
        ("cnn-plain-3", 64),
        ("lag-cnn", 28),
        ("lag-transformer", 1),
        ("patch-transformer", 18),
        ("deep-conv-lstm", 17),
        ("multimodal-transformer", 2),
        ("resnet", 1),
    ],
)
def test_shortest_possible_window_works(backbone: str, window: int) -> None:
    assert build_classifier(ModelSpec(backbone, 2, window, 3)).eval()(torch.randn(1, 2, window)).shape == (
        1,
        3,
    )


def test_the_strict_transformer_has_the_faults_of_the_benchmark() -> None:
    strict = build_classifier(ModelSpec("transformer-strict", 20, 32, 4, feedforward=16)).eval()
    assert "backbone.channel_embedding" not in strict.state_dict()
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(5))
    # without an embedding and within reach of each other, channels are a set: swapping two swaps their tokens
    near = build_classifier(ModelSpec("transformer-strict", 6, 32, 4, feedforward=16)).eval()
    tokens, swapped = (near.features(v).reshape(6, 64) for v in (x[:, :6], x[:, :6].flip(1)))
    torch.testing.assert_close(tokens, swapped.flip(0), rtol=1e-4, atol=1e-5)
    # channel 19 is 13 away from channel 6: after one layer it cannot be seen there, one nearer it can
    layer, changed = strict.backbone.layers[0], x.clone()
    changed[:, 19] += 1.0
    before, after = (layer(strict.backbone.embed(v), None)[0] for v in (x, changed))
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7], after[7])


def test_the_strict_transformer_divides_scores_by_the_root_of_the_number_of_tokens() -> None:
    qkv = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(6))
    mixed = attend(qkv, 2, scale=5.0**0.5, reach=12)
    query, key, value = (part.reshape(2, 5, 2, 8).transpose(1, 2) for part in qkv.split(16, dim=2))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=5.0**-0.5)
    torch.testing.assert_close(mixed, expected.transpose(1, 2).reshape(2, 5, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["patch-transformer", "deep-conv-lstm"])
def test_the_order_of_events_within_a_window_is_seen(backbone: str) -> None:
    model = build_classifier(ModelSpec(backbone, 3, 64, 4, kernel=8)).eval()
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(7))
    turned = x.reshape(1, 3, 8, 8).flip(2).reshape(1, 3, 64)  # the same patches, the last first
    assert not torch.allclose(model.features(x), model.features(turned), atol=1e-3)


def test_transformer_width_must_be_a_multiple_of_the_heads() -> None:
    with pytest.raises(ConfigError, match="multiple of its heads"):
        Transformer(6, 64, width=60, heads=8)
