"""Low-rank additions to attention: their formula, their roles, and what they begin with."""

import pytest
import torch
from wearfleet_models.classifier import ModelSpec, build_classifier, derived
from wearfleet_models.low_rank import LowRankQkv
from wearfleet_models.roles import tensor_roles
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorRole


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_queries_and_values_get_the_product_of_their_factors_and_keys_nothing(rank: int) -> None:
    torch.manual_seed(rank)
    layer = LowRankQkv(8, rank)
    for factor in (layer.query_b, layer.value_b):
        torch.nn.init.normal_(factor)
    x = torch.randn(5, 4, 8)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    expected = weight.clone()
    expected[:8] += 16.0 / rank * (layer.query_b @ layer.query_a).detach().double()
    expected[16:] += 16.0 / rank * (layer.value_b @ layer.value_a).detach().double()
    # sums of 8 and of rank terms in float32, of values up to 16 x 8: 100 x 2^-24 x 20
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.T + bias, rtol=1e-5, atol=2e-4)


def test_factors_have_roles_of_their_own_also_on_a_frozen_backbone() -> None:
    plain = build_classifier(ModelSpec("transformer", 3, 40, 4, feedforward=32))
    for frozen, rest in (("none", TensorRole.SHARED), ("backbone", TensorRole.FROZEN)):
        roles = tensor_roles(derived(plain, lora_rank=2, frozen=frozen))
        factors = {
            name: role for name, role in roles.items() if role in (TensorRole.LORA_A, TensorRole.LORA_B)
        }
        assert factors == {
            f"backbone.layers.{layer}.qkv.{part}_{letter}": TensorRole(f"LORA_{letter.upper()}")
            for layer in (0, 1)
            for part in ("query", "value")
            for letter in ("a", "b")
        }
        assert roles["backbone.layers.0.qkv.weight"] == rest
        assert roles["head.weight"] == TensorRole.HEAD


def test_a_derived_model_answers_as_before_until_b_is_trained() -> None:
    plain = build_classifier(ModelSpec("transformer", 3, 40, 4, feedforward=32), seed=2).eval()
    twin, x = derived(plain, 7, lora_rank=4, frozen="backbone"), torch.randn(6, 3, 40)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x), rtol=0, atol=1e-6)


def test_every_modality_has_factors_of_its_own() -> None:
    spec = ModelSpec("multimodal-transformer", 3, 40, 4, feedforward=32, modalities=(0, 1, 0))
    roles = tensor_roles(derived(build_classifier(spec), lora_rank=2, frozen="backbone"))
    for role, letter in ((TensorRole.LORA_A, "a"), (TensorRole.LORA_B, "b")):
        assert {name for name, own in roles.items() if own == role} == {
            f"backbone.encoders.{kind}.layers.{layer}.qkv.{part}_{letter}"
            for kind in (0, 1)
            for layer in (0, 1)
            for part in ("query", "value")
        }
    rest = {
        role for name, role in roles.items() if name.startswith("backbone.") and ".qkv.query_" not in name
    }
    assert rest == {TensorRole.LORA_A, TensorRole.LORA_B, TensorRole.FROZEN}


def test_only_the_transformers_of_channels_have_them() -> None:
    with pytest.raises(
        ConfigError, match="belong to the transformer and to multimodal-transformer, not to cnn"
    ):
        ModelSpec("cnn", 3, 40, 4, lora_rank=2)
    with pytest.raises(ConfigError, match="lora_rank"):
        ModelSpec("transformer", 3, 40, 4, lora_rank=-1)
