"""Random projections of low-rank factors, which keep the distances between clients and not the factors.

Source: Johnson and Lindenstrauss 1984, with signs as in Achlioptas 2003: the squared distance of d projected numbers is
right on average, with a relative standard deviation of sqrt(2 / d), 9 % at 256.
"""

import math
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_models.classifier import Classifier
from wearfleet_models.roles import tensor_specs
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.client_program import ClientPhase
from wearfleet_cloud.federated.client_steps import Tensors
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = ["sketch_phase"]

_NUMBERS: Final = 256
_KEY: Final = 1984


def sketch_phase(model: Classifier, local: LocalTraining) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """One step that projects every factor B to at most 256 numbers; a smaller one is sent as it is.

    Returns:
        The phase, and what it uploads: ``sketch/<layer>`` in the network's order.
    """
    factors = [spec for spec in tensor_specs(model) if spec.role == TensorRole.LORA_B]
    sizes = {math.prod(factor.shape) for factor in factors}
    device = next(model.parameters()).device
    projections = {size: _projection(size).to(device) for size in sizes if size > _NUMBERS}

    def step(given: Tensors) -> Tensors:
        results: Tensors = {}
        for layer, factor in enumerate(factors):
            flat = given[factor.name].clone().reshape(-1)
            projection = projections.get(flat.shape[0])
            projected = flat if projection is None else (flat[None, :] @ projection).reshape(-1)
            results[f"sketch/{layer}"] = projected
        return results

    loop = replace(local.train_loop(), epochs=1, max_steps=1, shuffle=False)
    specs = tuple(
        TensorSpec(
            f"sketch/{layer}",
            "float32",
            (min(math.prod(factor.shape), _NUMBERS),),
            TensorRole.AUX,
            TensorGroup.AUX,
            "zeros",
        )
        for layer, factor in enumerate(factors)
    )
    return ClientPhase("sketch", step, loop, ()), specs


def _projection(size: int) -> Tensor:
    """(size, 256) of +-1 / 16."""
    drawn = randomness.bits(torch.tensor(_KEY), 0, (size, _NUMBERS)) % 2
    return ((2.0 * drawn - 1.0) / math.sqrt(_NUMBERS)).to(torch.float32)
