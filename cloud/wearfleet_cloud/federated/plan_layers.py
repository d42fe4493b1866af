"""The layers of a model in the form that ONNX Runtime executes fastest on one core.

Each replaces a layer of ``wearfleet_models`` when a plan is compiled, has the same tensors under the same names and
the same values and gradients (compared in the tests); the originals stay the reference. What is gained: automatic
differentiation of the originals gives graphs with broadcast masks and reductions over an axis of length two, which
took a third of a training step.
"""

import copy
import math
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_models.classifier import Classifier
from wearfleet_models.layers import BatchNorm, Dropout, MaxPool

__all__ = ["PlanBatchNorm", "PlanDropout", "PlanMaxPool", "with_plan_layers"]


def with_plan_layers(model: Classifier) -> Classifier:
    """A copy of ``model`` with every batch normalisation and max-pool replaced by the plan's form."""
    copied = copy.deepcopy(model)
    for owner in list(copied.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, BatchNorm):
                setattr(owner, name, PlanBatchNorm.like(child))
            elif isinstance(child, MaxPool):
                setattr(owner, name, PlanMaxPool(child.size).train(child.training))
            elif isinstance(child, Dropout):
                setattr(owner, name, PlanDropout(child.p, child.salt).train(child.training))
    return copied


class PlanBatchNorm(BatchNorm):
    """Weighted batch normalisation whose backward pass is the closed form; evaluation is the parent's."""

    @classmethod
    def like(cls, original: BatchNorm) -> "PlanBatchNorm":
        """The same layer with the same tensors."""
        twin = cls(original.num_features, eps=original.eps, momentum=cast("float", original.momentum))
        twin.to(original.weight).load_state_dict(original.state_dict())
        return twin.train(original.training)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """As ``BatchNorm.forward``; without weights all windows weigh 1."""
        if x.ndim == 2 or not self.training:
            return super().forward(x, weight)
        weights = torch.ones_like(x[:, 0, 0]) if weight is None else weight
        total = weights.sum()
        share = (weights / torch.clamp(total, min=1e-12))[:, None]
        normalised, mean, variance = _WeightedNorm.apply(  # type: ignore[no-untyped-call]
            x, share, self.weight, self.bias, self.eps
        )
        count = total * x.shape[2]
        unbiased = variance.detach() * (count / torch.clamp(count - 1.0, min=1.0))
        self._track(mean.detach(), unbiased, self._rate * (total > 0).to(x.dtype))
        return cast("Tensor", normalised)


class PlanMaxPool(MaxPool):
    """Max-pool from a split instead of a reduction; of equal samples the first takes the gradient, as in cuDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T // size)."""
        if not self.training:
            return super().forward(x)
        groups = x.shape[2] // self.size
        cropped = x if groups * self.size == x.shape[2] else x[:, :, : groups * self.size]
        members = cropped.reshape(*x.shape[:2], groups, self.size)
        return cast("Tensor", _GroupMaximum.apply(members))  # type: ignore[no-untyped-call]


class PlanDropout(Dropout):
    """Dropout that compares the random integers themselves: the same masks without turning them into fractions."""

    def forward(self, x: Tensor, rng: Tensor | None = None) -> Tensor:
        """As ``Dropout.forward``."""
        if not self.training or rng is None or self.p == 0.0:
            return x
        lowest_kept = math.ceil(float(np.float32(self.p)) * 2**24) * 256
        keep = randomness.bits(rng, self.salt, tuple(x.shape)) >= lowest_kept
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - self.p)))


class _WeightedNorm(torch.autograd.Function):
    """y = gamma (x - m) / sqrt(v + eps) + beta, m = sum_b p_b mean_t x, v the same of (x - m)^2, sum_b p_b = 1.

    Backward, with r = 1 / sqrt(v + eps), c = x - m, q_b = p_b / T, G = sum g c, S = sum g:
        d beta = S;  d gamma = r G;  d x = gamma r (g - q_b (S + r^2 G c)).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, share: Tensor, gamma: Tensor, beta: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = (x.mean(dim=2) * share).sum(dim=0)
        centred = x - mean[:, None]
        variance = ((centred * centred).mean(dim=2) * share).sum(dim=0)
        return _affine(centred, gamma * torch.rsqrt(variance + eps), beta), mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, share, gamma, _, eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, share, gamma, mean, variance)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, share, gamma, mean, variance = ctx.saved_tensors
        grad = grads[0]
        inverse = torch.rsqrt(variance + ctx.eps)
        centred = x - mean[:, None]
        along = (grad * centred).sum(dim=2).sum(dim=0)
        total = grad.sum(dim=2).sum(dim=0)
        pull = _affine(centred, inverse * inverse * along, total) * (share / x.shape[2])[:, :, None]
        return (grad - pull) * (gamma * inverse)[:, None], None, inverse * along, total, None


class _GroupMaximum(torch.autograd.Function):
    """(B, C, G, size) -> (B, C, G), the maximum over the last axis."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        first, *others = torch.split(x, 1, dim=3)
        for other in others:
            first = torch.maximum(first, other)
        return first.reshape(x.shape[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, highest = ctx.saved_tensors
        left, top = grads[0].unsqueeze(3), highest.unsqueeze(3)
        parts = []
        for candidate in torch.split(x, 1, dim=3)[:-1]:
            taken = left * (candidate >= top).to(left.dtype)
            parts.append(taken)
            left = left - taken
        return torch.cat([*parts, left], dim=3)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Per channel x * scale + shift, in one pass: a batch normalisation with mean 0 and variance 1."""
    zeros = torch.zeros_like(scale)
    return F.batch_norm(x, zeros, torch.ones_like(scale), scale, shift, training=False, eps=0.0)
