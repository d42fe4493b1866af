"""Necks compute what their papers say, out of torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from wearfleet_models import NECKS, Classifier, ModelSpec, build_classifier, tensor_roles
from wearfleet_models.necks import Mixture
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole

WIDTH, DOMAINS = 8, 3
FEATURES = 224  # of the CNN: 32 filters x 7


def model(neck: str) -> Classifier:
    spec = ModelSpec("cnn", 3, 40, 4, kernel=5, neck=neck, neck_width=WIDTH, domains=DOMAINS)
    return build_classifier(spec, seed=2)


def features(rows: int = 6) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1))


def test_without_a_neck_names_and_weights_are_those_of_models_that_knew_none() -> None:
    bare = build_classifier(ModelSpec("cnn", 3, 40, 4, kernel=5), seed=2)
    assert list(bare.state_dict()) == [
        "standardise.mean",
        "standardise.std",
        *(
            f"backbone.{layer}{k}.{part}"
            for k in (1, 2)
            for layer, parts in {
                "conv": ("weight", "bias"),
                "norm": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
            }.items()
            for part in parts
        ),
        "head.weight",
        "head.bias",
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        first = nn.Conv1d(3, 16, 5)
        nn.Conv1d(16, 32, 5)
        head = nn.Linear(FEATURES, 4)
    assert torch.equal(bare.backbone.conv1.weight, first.weight)
    assert torch.equal(bare.head.weight, head.weight)


@pytest.mark.parametrize("neck", ["none", "tanh", "relu", "sigmoid"])
def test_a_neck_without_tensors_changes_numbers_one_by_one(neck: str) -> None:
    built = model(neck)
    functions = {
        "none": lambda z: z,
        "tanh": torch.tanh,
        "relu": nn.functional.relu,
        "sigmoid": torch.sigmoid,
    }
    assert torch.equal(built.neck(features(), None), functions[neck](features()))
    assert not built.neck.state_dict()
    assert built.head.in_features == FEATURES


@pytest.mark.parametrize("training", [True, False])
def test_the_bottleneck_is_a_linear_layer_and_batch_normalisation(training: bool) -> None:
    neck = model("bottleneck").neck.train(training)
    norm = nn.BatchNorm1d(WIDTH).train(training)
    norm.load_state_dict(neck.norm.state_dict())
    for _ in range(2):
        out, expected = neck(features(), None), norm(neck.linear(features()))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(neck.norm.state_dict(), norm.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_bottleneck_follows_the_weights_of_the_windows() -> None:
    padded, short = model("bottleneck").neck, model("bottleneck").neck
    junk = torch.cat([features(4), torch.full((2, FEATURES), 1e3)])
    out = padded(junk, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    # float32 sums of 224 products of order 1: eps x sqrt(224) = 2e-6
    torch.testing.assert_close(out[:4], short(features(4), None), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.state_dict(), short.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_dense_neck_is_a_linear_layer_and_relu() -> None:
    neck = model("dense").neck
    assert torch.equal(neck(features(), None), nn.functional.relu(neck.linear(features())))


def test_the_mixture_is_the_sum_of_its_branches_window_by_window() -> None:
    neck = model("mixture").neck
    specific, invariant, domain_logits = neck.parts(features())
    for row, f in enumerate(features()):
        share = torch.softmax(neck.domain.weight @ f + neck.domain.bias, dim=0)
        branches = [
            torch.relu(w @ f + b) for w, b in zip(neck.branches.weight, neck.branches.bias, strict=True)
        ]
        mixed = sum(q * branch for q, branch in zip(share, branches, strict=True))
        common = torch.relu(neck.invariant.weight @ f + neck.invariant.bias)
        torch.testing.assert_close(specific[row], mixed, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(invariant[row], common, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.softmax(domain_logits[row], 0), share, rtol=1e-5, atol=1e-6)
    assert torch.equal(neck(features(), None), specific + invariant)
    assert neck.branches.weight.shape == (DOMAINS, WIDTH, FEATURES)


def test_branches_start_as_linear_layers_do() -> None:
    weight = Mixture(400, 50, 4).branches.weight.detach()
    bound = 400**-0.5  # of the uniform distribution of nn.Linear; 80 000 draws come within 1e-4 of it
    assert bound * (1 - 1e-3) < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("neck", NECKS)
def test_features_are_what_the_head_takes(neck: str) -> None:
    built = model(neck).eval()
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(3))
    embedding = built.features(x)
    assert embedding.shape == (5, built.head.in_features)
    assert torch.equal(built(x), built.head(embedding))
    assert torch.equal(embedding, built.neck(built.backbone(built.standardise(x), None, None), None))


def test_roles_of_a_neck_follow_its_layers() -> None:
    roles = tensor_roles(model("bottleneck"))
    assert roles["neck.linear.weight"] is TensorRole.SHARED
    assert roles["neck.norm.weight"] is TensorRole.NORM_AFFINE
    assert roles["neck.norm.running_var"] is TensorRole.NORM_STAT
    assert roles["neck.norm.num_batches_tracked"] is TensorRole.COUNTER
    mixture = tensor_roles(model("mixture"))
    names = ("branches.weight", "branches.bias", "domain.weight", "invariant.weight")
    assert {mixture[f"neck.{name}"] for name in names} == {TensorRole.SHARED}


@pytest.mark.parametrize("neck", NECKS)
def test_a_specification_and_its_dictionary_are_inverses(neck: str) -> None:
    spec = model(neck).spec
    assert ModelSpec(**spec.to_dict()) == spec


def test_a_dictionary_from_before_necks_is_a_model_without_one() -> None:
    old = {"backbone": "cnn", "channels": 3, "window": 40, "classes": 4, "kernel": 5, "dropout": 0.2}
    assert ModelSpec(**old, feedforward=2048) == ModelSpec("cnn", 3, 40, 4, kernel=5, neck="none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neck": "identity"}, "unknown neck 'identity'; known: none, bottleneck, dense, tanh"),
        ({"neck": "bottleneck", "neck_width": 0}, "neck_width .* at least 1, got 0"),
        ({"neck": "mixture"}, "domains .* at least 1, got 0"),
        ({"domains": -1}, "domains .* at least 0, got -1"),
        ({"domains": 2.0}, "domains .* got 2.0"),
    ],
)
def test_an_impossible_neck_is_refused_with_the_reason(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec("cnn", 3, 40, 4, **settings)
