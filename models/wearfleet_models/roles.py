"""Which part each tensor of a model plays, found from the type of its module and never from its name."""

from collections.abc import Iterator

from torch import Tensor, nn
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_models.classifier import FROZEN, Classifier
from wearfleet_models.layers import BatchNorm, Standardise
from wearfleet_models.low_rank import LowRankQkv
from wearfleet_models.surgery import InputSurgery

__all__ = ["tensor_roles", "tensor_specs"]


def tensor_roles(module: nn.Module) -> dict[str, TensorRole]:
    """The role of every parameter and buffer of a model.

    Standardise is FROZEN, and so is what a classifier's specification says is frozen, but for counters; factors of
    low-rank additions are LORA_A and LORA_B; weights and biases of BatchNorm and LayerNorm are NORM_AFFINE, running
    statistics NORM_STAT, their counter COUNTER; everything in a classifier's head and behind it is HEAD; the code of an
    InputSurgery is CLIENT_EMB, its decoder AUX; the rest is SHARED.

    Args:
        module: any model of ours.

    Returns:
        Name as in ``state_dict`` -> role, in the order of ``state_dict``.
    """
    classifiers = [owner for owner in module.modules() if isinstance(owner, Classifier)]
    heads = {
        id(part) for owner in classifiers for last in (owner.head, owner.remap) for part in last.modules()
    }
    decoders = {
        id(part)
        for owner in module.modules()
        if isinstance(owner, InputSurgery)
        for part in owner.decoder.modules()
    }
    frozen = {
        id(part)
        for owner in classifiers
        for name in FROZEN[owner.spec.frozen]
        for part in owner.get_submodule(name).modules()
    }
    roles: dict[str, TensorRole] = {}
    for prefix, owner in module.named_modules():
        for name, tensor in _own_tensors(owner):
            full_name = f"{prefix}.{name}" if prefix else name
            factor = _factor(owner, tensor)
            if factor is not None:
                roles[full_name] = factor
            elif id(owner) in frozen and _role(owner, tensor, name) != TensorRole.COUNTER:
                roles[full_name] = TensorRole.FROZEN
            elif id(owner) in decoders:
                roles[full_name] = TensorRole.AUX
            else:
                roles[full_name] = TensorRole.HEAD if id(owner) in heads else _role(owner, tensor, name)
    return {name: roles[name] for name in module.state_dict()}


def tensor_specs(module: nn.Module) -> tuple[TensorSpec, ...]:
    """Name, dtype, shape, role and group of every tensor of a model, in the order of ``state_dict``."""
    parameters = dict(module.named_parameters())
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            role=role,
            group=TensorGroup.PARAM if name in parameters else TensorGroup.BUFFER,
        )
        for (name, role), tensor in zip(
            tensor_roles(module).items(), module.state_dict().values(), strict=True
        )
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _factor(owner: nn.Module, tensor: Tensor) -> TensorRole | None:
    """The role of a factor of a low-rank addition; None for every other tensor."""
    if not isinstance(owner, LowRankQkv):
        return None
    if tensor is owner.query_a or tensor is owner.value_a:
        return TensorRole.LORA_A
    return TensorRole.LORA_B if tensor is owner.query_b or tensor is owner.value_b else None


def _role(owner: nn.Module, tensor: Tensor, name: str) -> TensorRole:
    if isinstance(owner, Standardise):
        return TensorRole.FROZEN
    if isinstance(owner, InputSurgery):
        return TensorRole.CLIENT_EMB
    if isinstance(owner, BatchNorm):
        if tensor is owner.num_batches_tracked:
            return TensorRole.COUNTER
        return TensorRole.NORM_AFFINE if name in owner._parameters else TensorRole.NORM_STAT  # noqa: SLF001 - torch has no public test of it
    return TensorRole.NORM_AFFINE if isinstance(owner, nn.LayerNorm) else TensorRole.SHARED
