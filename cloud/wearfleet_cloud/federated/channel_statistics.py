"""What enters each batch normalisation, per channel: measured on the device, in one pass or from running statistics.

Both kinds give ``statistics/<layer>/mean`` and ``statistics/<layer>/variance``, layer by layer in the network's order.
They begin with zeros and are uploaded, so that what the server gets are the values. Labels play no part.

Source: specs/federated.md section 4, phase A, and section 0.4.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from wearfleet_models.classifier import Classifier
from wearfleet_models.layers import BatchNorm
from wearfleet_models.roles import tensor_specs
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.client_program import ClientPhase
from wearfleet_cloud.federated.client_steps import Tensors
from wearfleet_cloud.federated.plan_compiler import Step
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = ["pooled_phase", "running_phase"]

_COUNT: Final = "statistics_count"

Moments = tuple[Tensor, Tensor]


def pooled_phase(
    reference: Classifier, local: LocalTraining
) -> tuple[ClientPhase, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Exact moments of all training windows in a frozen network.

    Batches are pooled as n <- n + w, mean <- mean + s (m - mean), var <- var + s (v - var) + s (1 - s) (m - mean)^2,
    s = w / n, with the biased variances of a batch of w windows.

    Args:
        reference: its tensors become constants of the phase's graph: they travel once, with the graph.
        local: size of a batch.

    Returns:
        The phase, its statistics, and what else it counts with.

    Raises:
        ConfigError: there is no batch normalisation.
    """
    network = copy.deepcopy(reference).eval()
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    specs = _statistics([norm.num_features for norm in norms])
    seen: list[Tensor] = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    constants = {name: tensor.detach() for name, tensor in network.state_dict().items()}

    def step(given: Tensors) -> Tensors:
        seen.clear()
        functional_call(network, constants, (given["x"],))
        batch = given["weight"].sum()
        count = given[_COUNT] + batch
        share = batch / torch.clamp(count, min=1.0)
        results: Tensors = {_COUNT: count}
        for entering, names in zip(seen, _pairs(specs), strict=True):
            before = given[names[0]], given[names[1]]
            after = _pooled(before, _moments(entering, given["weight"] / torch.clamp(batch, min=1.0)), share)
            results |= dict(zip(names, after, strict=True))
        return results

    loop = replace(local.train_loop(), epochs=1, max_steps=0, shuffle=False)
    count = TensorSpec(_COUNT, "float32", (), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros")
    return ClientPhase("statistics", step, loop, ()), specs, (count,)


def running_phase(model: nn.Module, local: LocalTraining) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """The network's own running statistics, after the phases before.

    Returns:
        The phase, which is one step, and its statistics.

    Raises:
        ConfigError: there is no batch normalisation.
    """
    running = [spec for spec in tensor_specs(model) if spec.role == TensorRole.NORM_STAT]
    specs = _statistics([spec.shape[0] for spec in running[::2]])
    sources = {spec.name: source.name for spec, source in zip(specs, running, strict=True)}
    loop = replace(local.train_loop(), epochs=1, max_steps=1, shuffle=False)
    return ClientPhase("statistics", _copying(sources), loop, ()), specs


def _copying(sources: dict[str, str]) -> Step:
    return lambda given: {name: given[source].clone() for name, source in sources.items()}


def _statistics(channels: Sequence[int]) -> tuple[TensorSpec, ...]:
    if not channels:
        raise ConfigError(
            "the similarity of clients is measured on what enters batch normalisation, and this network has none; use "
            "the cnn backbone"
        )
    return tuple(
        TensorSpec(
            f"statistics/{layer}/{moment}",
            "float32",
            (count,),
            TensorRole.AUX,
            TensorGroup.AUX,
            "zeros",
        )
        for layer, count in enumerate(channels)
        for moment in ("mean", "variance")
    )


def _pairs(specs: Sequence[TensorSpec]) -> list[tuple[str, str]]:
    names = [spec.name for spec in specs]
    return list(zip(names[::2], names[1::2], strict=True))


def _moments(entering: Tensor, share: Tensor) -> Moments:
    """Mean and biased variance of each channel: (B, C, T) or (B, C), and (B,) shares of the windows, to (C,) each."""
    values = entering.reshape(*entering.shape[:2], -1)
    mean = (values.mean(dim=2) * share[:, None]).sum(dim=0)
    centred = values - mean[:, None]
    return mean, ((centred * centred).mean(dim=2) * share[:, None]).sum(dim=0)


def _pooled(before: Moments, batch: Moments, share: Tensor) -> Moments:
    apart = batch[0] - before[0]
    mean = before[0] + share * apart
    return mean, before[1] + share * (batch[1] - before[1]) + share * (1.0 - share) * apart * apart
