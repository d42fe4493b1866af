"""Tensor roles follow the type of the module."""

from __future__ import annotations

import torch
from torch import nn
from wearfleet_models import Classifier, ModelSpec, build_classifier, tensor_roles, tensor_specs
from wearfleet_protos.tensors import TensorGroup, TensorRole, schema_hash


def _cnn() -> Classifier:
    return build_classifier(ModelSpec("cnn", 6, 64, 4))


def test_every_tensor_of_the_cnn_has_the_role_of_its_module() -> None:
    norm = {
        "weight": TensorRole.NORM_AFFINE,
        "bias": TensorRole.NORM_AFFINE,
        "running_mean": TensorRole.NORM_STAT,
        "running_var": TensorRole.NORM_STAT,
        "num_batches_tracked": TensorRole.COUNTER,
    }
    assert tensor_roles(_cnn()) == {
        "standardise.mean": TensorRole.FROZEN,
        "standardise.std": TensorRole.FROZEN,
        **{f"backbone.conv{k}.{part}": TensorRole.SHARED for k in (1, 2) for part in ("weight", "bias")},
        **{f"backbone.norm{k}.{part}": role for k in (1, 2) for part, role in norm.items()},
        "head.weight": TensorRole.HEAD,
        "head.bias": TensorRole.HEAD,
    }


def test_layer_normalisation_is_normalisation_and_other_layers_are_shared() -> None:
    roles = tensor_roles(build_classifier(ModelSpec("transformer", 6, 64, 4, feedforward=32)))
    assert roles["backbone.layers.1.norm2.bias"] is TensorRole.NORM_AFFINE
    assert roles["backbone.channel_embedding"] is TensorRole.SHARED
    assert roles["backbone.layers.0.qkv.weight"] is TensorRole.SHARED


def test_names_play_no_part() -> None:
    module = nn.ModuleDict(
        {"head": nn.Linear(2, 2), "running_mean": nn.Linear(2, 2), "norm": nn.Conv1d(1, 1, 1)}
    )
    assert set(tensor_roles(module).values()) == {TensorRole.SHARED}


def test_specifications_follow_the_state_dict() -> None:
    model = _cnn()
    specs, state = tensor_specs(model), model.state_dict()
    assert [spec.name for spec in specs] == list(state)
    assert all(spec.shape == tuple(state[spec.name].shape) for spec in specs)
    groups = {spec.name: spec.group for spec in specs}
    assert groups["head.bias"] is TensorGroup.PARAM
    assert groups["standardise.mean"] is TensorGroup.BUFFER
    counter = next(spec for spec in specs if spec.role is TensorRole.COUNTER)
    assert (counter.dtype, counter.shape) == ("int64", ())


def test_schema_hash_depends_on_shape_and_not_on_values() -> None:
    model, same = _cnn(), _cnn()
    with torch.no_grad():
        same.head.weight.zero_()
    assert schema_hash(tensor_specs(model)) == schema_hash(tensor_specs(same))
    other = build_classifier(ModelSpec("cnn", 6, 64, 5))
    assert schema_hash(tensor_specs(model)) != schema_hash(tensor_specs(other))
