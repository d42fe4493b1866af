"""Optimisers as pure functions of named tensors.

``update(params, grads, slots, lr)`` returns new parameters and new slots and changes nothing, so it can be
stacked with ``torch.func.vmap`` and traced into a graph. SGD and Adam handle all parameters as one flat vector:
a dozen operations in place of a dozen for every tensor. Their numbers are those of ``torch.optim`` (compared in
the tests).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError

__all__ = ["OPTIMISERS", "Adam", "Lars", "Optimiser", "Sgd"]

Tensors = dict[str, Tensor]


class Optimiser(Protocol):
    """One update of named parameters from their gradients."""

    def init(self, params: Mapping[str, Tensor]) -> Tensors:
        """The slots before the first update."""

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensors, Tensors]:
        """One step.

        Args:
            params: named parameters, one dtype.
            grads: the same names and shapes.
            slots: from ``init`` or the step before.
            lr: () learning rate.

        Returns:
            New parameters and new slots, of the same names and shapes.
        """


@dataclass(frozen=True, slots=True)
class Sgd:
    """Gradient descent with heavy-ball momentum and coupled weight decay.

    g' = g + weight_decay p;  m = momentum m + g';  p = p - lr m.   Slots: "momentum/<param>" (none without
    momentum).

    Source: as ``torch.optim.SGD`` with dampening 0 (its first step, m = g', is the same rule from m = 0).

    Raises:
        ConfigError: a setting is out of range.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_range("momentum", self.momentum)
        _check_decay(self.weight_decay)

    def init(self, params: Mapping[str, Tensor]) -> Tensors:
        """Zero momentum for every parameter."""
        return (
            {f"momentum/{name}": torch.zeros_like(p) for name, p in params.items()} if self.momentum else {}
        )

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensors, Tensors]:
        """As ``Optimiser.update``."""
        p, step = _flatten(params, params), _flatten(grads, params)
        if self.weight_decay:
            step = step + self.weight_decay * p
        if not self.momentum:
            return _unflatten(p - lr * step, params), {}
        step = self.momentum * _flatten(slots, params, "momentum/") + step
        return _unflatten(p - lr * step, params), _unflatten(step, params, "momentum/")


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam with coupled weight decay (added to the gradient, not AdamW).

    Slots: "adam_m/<param>", "adam_v/<param>", "adam_step" (float32 scalar, the number of updates made).

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; as ``torch.optim.Adam``.

    Raises:
        ConfigError: a setting is out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_range("beta1", self.betas[0])
        _check_range("beta2", self.betas[1])
        _check_decay(self.weight_decay)
        if self.eps <= 0:
            raise ConfigError(f"eps of Adam must be above 0, got {self.eps}")

    def init(self, params: Mapping[str, Tensor]) -> Tensors:
        """Zero moments and a step count of 0."""
        first = {f"adam_m/{name}": torch.zeros_like(p) for name, p in params.items()}
        second = {f"adam_v/{name}": torch.zeros_like(p) for name, p in params.items()}
        device = next(iter(params.values())).device
        return {**first, **second, "adam_step": torch.zeros((), dtype=torch.float32, device=device)}

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensors, Tensors]:
        """As ``Optimiser.update``."""
        beta1, beta2 = self.betas
        p, g = _flatten(params, params), _flatten(grads, params)
        if self.weight_decay:
            g = g + self.weight_decay * p
        step = slots["adam_step"] + 1.0
        m = beta1 * _flatten(slots, params, "adam_m/") + (1.0 - beta1) * g
        v = beta2 * _flatten(slots, params, "adam_v/") + (1.0 - beta2) * (g * g)
        precise = step.double()  # in float32 the first 1 - 0.999**step would lose half of its digits
        rate = lr / (1.0 - beta1**precise).to(lr.dtype)
        root = torch.sqrt(v) / torch.sqrt(1.0 - beta2**precise).to(p.dtype)
        p = p - rate * (m / (root + self.eps))
        moments = {**_unflatten(m, params, "adam_m/"), **_unflatten(v, params, "adam_v/")}
        return _unflatten(p, params), {**moments, "adam_step": step}


@dataclass(frozen=True, slots=True)
class Lars:
    """SGD whose gradient is rescaled, tensor by tensor, to a fixed share of the norm of the parameters.

    g' = q (g + weight_decay p), q = trust |p| / |g + weight_decay p| (1 where a norm is 0);  m = momentum m + g';
    p = p - lr m.   Tensors of less than two dimensions have g' = g.   Slots: "momentum/<param>".

    Source: You et al. 2017, arXiv:1708.03888, algorithm 1.
    Differs: q takes the norm of gradient and decay together, and vectors are left out (as ERM++, specs/ood.md 2.16).

    Raises:
        ConfigError: a setting is out of range.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    trust: float = 1e-3

    def __post_init__(self) -> None:
        _check_range("momentum", self.momentum)
        _check_decay(self.weight_decay)
        if self.trust <= 0:
            raise ConfigError(f"trust of LARS must be above 0, got {self.trust}")

    def init(self, params: Mapping[str, Tensor]) -> Tensors:
        """Zero momentum for every parameter."""
        return {f"momentum/{name}": torch.zeros_like(p) for name, p in params.items()}

    def update(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        lr: Tensor,
    ) -> tuple[Tensors, Tensors]:
        """As ``Optimiser.update``."""
        m = {n: self.momentum * slots[f"momentum/{n}"] + self._scaled(p, grads[n]) for n, p in params.items()}
        return {n: p - lr * m[n] for n, p in params.items()}, {f"momentum/{n}": step for n, step in m.items()}

    def _scaled(self, p: Tensor, g: Tensor) -> Tensor:
        if p.dim() < 2:
            return g
        g = g + self.weight_decay * p
        size, slope = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
        measured = (size > 0.0) & (slope > 0.0)
        return g * torch.where(measured, self.trust * size / slope.clamp(min=1e-30), 1.0)


OPTIMISERS: Final = {"adam": Adam, "sgd": Sgd, "lars": Lars}


def _flatten(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], prefix: str = "") -> Tensor:
    """All tensors, in the order of ``like``, as one vector (P,)."""
    return torch.cat([tensors[prefix + name].reshape(-1) for name in like])


def _unflatten(vector: Tensor, like: Mapping[str, Tensor], prefix: str = "") -> Tensors:
    """Inverse of ``_flatten``."""
    parts = torch.split(vector, [p.numel() for p in like.values()])
    return {prefix + name: part.reshape(p.shape) for (name, p), part in zip(like.items(), parts, strict=True)}


def _check_range(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} of the optimiser must be at least 0 and below 1, got {value}")


def _check_decay(value: float) -> None:
    if value < 0.0:
        raise ConfigError(f"weight decay must not be negative, got {value}")
