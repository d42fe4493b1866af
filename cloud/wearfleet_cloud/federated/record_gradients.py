"""The gradient of DP-SGD: of every window by itself, clipped, summed, noised, over the expected size of a batch.

    g = (sum_b w_b min(1, C / |g_b|) g_b + sigma xi) / (q N),   sigma = z C,   xi normal numbers of the device's own.

Layers that mix the windows of a batch have no gradient of a window by itself. Batch normalisation therefore works with
the statistics that the model came with, as a fixed scale and shift; they do not change. Windows of a step share their
dropout mask.

Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
Differs: the divisor is the expected size of the batch, not the drawn one (as Opacus has it); the norm of a gradient is
taken in float32, so that a clipped one may exceed C by rounding, about 1e-6 of it.
"""

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from wearfleet_models.classifier import Classifier
from wearfleet_models.layers import BatchNorm
from wearfleet_protos.tensors import TensorRole, TensorSpec

from wearfleet_cloud.federated.client_steps import (
    Direction,
    Loss,
    Tensors,
    WithEmbedding,
    cross_entropy,
    is_trained,
    metrics_of,
    update_groups,
    weighted_mean,
)
from wearfleet_cloud.federated.privacy.options import RECORD_CLIP, RECORD_SIGMA

__all__ = ["noised_gradient", "noised_numbers"]

_SMALLEST = 1e-30
"""Of a norm that is divided by: a gradient of zero stays zero."""


def noised_numbers(specs: Sequence[TensorSpec], roles: Collection[TensorRole]) -> int:
    """P: how many numbers are noised in a step that trains these roles."""
    return sum(torch.Size(spec.shape).numel() for spec in specs if is_trained(spec, roles))


def noised_gradient(
    model: Classifier, specs: Sequence[TensorSpec], roles: Collection[TensorRole], loss: Loss | None = None
) -> Direction:
    """As ``client_steps.loss_gradient``, of single windows, clipped to RECORD_CLIP and with noise of RECORD_SIGMA.

    Args:
        model: the classifier; it is copied.
        specs: its tensors.
        roles: of the parameters.
        loss: of a batch of one window; None for cross-entropy.
    """
    trains = TensorRole.SHARED in roles and model.spec.frozen == "none"
    network = WithEmbedding(_without_batches(model).train(trains))
    rest = tuple(spec.name for spec in specs if not is_trained(spec, roles))

    def direction(params: Tensors, given: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        fixed = {name: given[name] for name in rest}

        def of_window(x: Tensor, y: Tensor) -> tuple[Tensors, Tensor]:
            one = {**given, "x": x[None], "y": y[None], "weight": torch.ones_like(given["weight"][:1])}

            def objective(params: Tensors) -> tuple[Tensor, Tensor]:
                tensors = network.names({**params, **fixed})
                features, logits = functional_call(network, tensors, (one["x"], one["weight"], one["rng"]))
                own = weighted_mean(cross_entropy(logits, one["y"]), one)
                return own if loss is None else loss(features, logits, one), logits[0]

            grads, (_, logits) = grad_and_value(objective, has_aux=True)(params)
            return grads, logits

        grads, logits = vmap(of_window)(given["x"], given["y"])
        losses = cross_entropy(logits, given["y"])
        return _noised_sum(grads, params, given), {}, metrics_of(logits, losses, given)

    return direction


def _noised_sum(grads: Tensors, params: Tensors, given: Tensors) -> Tensors:
    """From gradients (B, ...) of each window to the noised one.

    Small parameters are one vector; a large one would be copied for that, and all windows have one each.
    """
    windows = given["weight"].shape[0]
    sizes = {name: tensor.numel() for name, tensor in params.items()}
    noise = dict(zip(sizes, torch.split(given["noise"], list(sizes.values())), strict=True))
    groups = update_groups({name: tuple(tensor.shape) for name, tensor in params.items()}).values()
    flats = [torch.cat([grads[name].reshape(windows, -1) for name in names], dim=1) for names in groups]
    squares = [(flat * flat).sum(dim=1) for flat in flats]
    norms = torch.sqrt(torch.stack(squares).sum(dim=0))
    share = given["weight"] * torch.clamp(given[RECORD_CLIP] / torch.clamp(norms, min=_SMALLEST), max=1.0)
    noised: Tensors = {}
    for names, flat in zip(groups, flats, strict=True):
        drawn = torch.cat([noise[name] for name in names])
        total = ((share[None, :] @ flat)[0] + given[RECORD_SIGMA] * drawn) / given["expected"]
        pieces = torch.split(total, [sizes[name] for name in names])
        noised |= {n: piece.reshape(params[n].shape) for n, piece in zip(names, pieces, strict=True)}
    return {name: noised[name] for name in params}


def _without_batches(model: Classifier) -> Classifier:
    copied = copy.deepcopy(model)
    for owner in list(copied.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, BatchNorm):
                setattr(owner, name, _FixedNorm(child))
    return copied


class _FixedNorm(nn.Module):
    """Batch normalisation by its running statistics, in training too; the same tensors under the same names."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, original: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(original, name))
        self._eps = original.eps

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - of BatchNorm
        """(B, C, T) or (B, C) -> the same shape."""
        scale = self.weight * torch.rsqrt(self.running_var + self._eps)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None] + shift[:, None] if x.ndim > 2 else x * scale + shift
