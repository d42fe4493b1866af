"""Random projections of low-rank factors, which keep the distances between clients and not the factors.

Every column of a factor has a projection of its own, so that clients of unequal ranks can be compared over the columns
that they have in common.

Source: Johnson and Lindenstrauss 1984, with signs as in Achlioptas 2003: the squared distance of d projected numbers is
right on average, with a relative standard deviation of sqrt(2 / d) where columns differ alike: 9 % at 256, and over c
of R columns sqrt(R / c) times as much.
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
from wearfleet_cloud.federated.factor_masks import HELD
from wearfleet_cloud.federated.factor_ranks import RANK
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = ["sketch_phase"]

_NUMBERS: Final = 256
_KEY: Final = 1984


def sketch_phase(model: Classifier, local: LocalTraining) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """One step that projects the columns of every factor B to at most 256 numbers a factor, and counts its own columns.

    A column that is no longer than its projection is sent as it is.

    Returns:
        The phase, and what it uploads: ``sketch/<layer>`` (R, numbers a column) in the network's order, and ``rank``.
    """
    factors = [spec for spec in tensor_specs(model) if spec.role == TensorRole.LORA_B]
    device = next(model.parameters()).device
    projections = {
        factor.shape: _projection(factor).to(device)
        for factor in factors
        if _numbers(factor) < factor.shape[0]
    }

    def step(given: Tensors) -> Tensors:
        results: Tensors = {}
        for layer, factor in enumerate(factors):
            columns = given[factor.name].T  # (R, width)
            projection = projections.get(factor.shape)
            projected = columns if projection is None else (columns[:, None, :] @ projection)[:, 0]
            results[f"sketch/{layer}"] = projected
        return {**results, RANK: given[HELD].sum()}

    loop = replace(local.train_loop(), epochs=1, max_steps=1, shuffle=False)
    sent = {f"sketch/{layer}": (factor.shape[1], _numbers(factor)) for layer, factor in enumerate(factors)}
    specs = tuple(
        TensorSpec(name, "float32", shape, TensorRole.AUX, TensorGroup.AUX, "zeros")
        for name, shape in {**sent, RANK: ()}.items()
    )
    return ClientPhase("sketch", step, loop, ()), specs


def _numbers(factor: TensorSpec) -> int:
    """Numbers of the sketch of one column of a factor (width, R)."""
    width, rank = factor.shape
    return min(width, max(1, _NUMBERS // rank))


def _projection(factor: TensorSpec) -> Tensor:
    """(R, width, numbers) of +-1 / sqrt(numbers)."""
    numbers = _numbers(factor)
    drawn = randomness.bits(torch.tensor(_KEY), 0, (*reversed(factor.shape), numbers)) % 2
    return ((2.0 * drawn - 1.0) / math.sqrt(numbers)).to(torch.float32)
