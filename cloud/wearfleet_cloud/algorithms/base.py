"""What an algorithm is: a pure step over named tensors.

``step(state, batch, hyper, rng)`` returns a new state and scalars, reads and writes nothing else, and has
no Python control flow that depends on values. The same function therefore runs as it stands, stacked over
many runs with ``torch.func.vmap``, and traced into a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from wearfleet_models import Classifier, randomness

from wearfleet_cloud.kernels.soft_cross_entropy import soft_cross_entropy
from wearfleet_cloud.training.optimisers import Optimiser

__all__ = [
    "Algorithm",
    "AlgorithmInfo",
    "Batch",
    "Need",
    "Objective",
    "State",
    "accuracy",
    "call",
    "cross_entropy",
    "descend",
    "domain_risks",
    "features_of_domains",
    "initial_state",
    "pooled",
]

Tensors = dict[str, Tensor]
Need = Literal[
    "domain labels", "unlabelled target data", "per-domain gradients", "per-sample gradients", "full pass"
]
Objective = Callable[[Tensors, Tensors], tuple[Tensor, tuple[Tensors, Tensors]]]
"""(params, buffers) -> (loss, (metrics, new buffers))."""


class State(NamedTuple):
    """All that a training step carries to the next."""

    params: Tensors
    buffers: Tensors
    slots: Tensors
    extras: Tensors


class Batch(NamedTuple):
    """One mini-batch of every source domain.

    Args:
        x: (D, B, C, T) float32 raw units.
        y: (D, B) int64 class.
        weight: (D, B) float32 weight of each window, 0 for padding; None for all ones.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AlgorithmInfo:
    """What a reader wants to know before choosing an algorithm.

    Args:
        name: in the registry.
        title: as people write it.
        paper: where it comes from.
        family: group of ideas it belongs to.
        needs: beyond labels.
        forward: "joint" normalises all domains together, "per-domain" each by its own batch statistics.
        inference: network that is exported.
        hyper: defaults of the hyper-parameters ``step`` reads besides "lr".
        options: choices that change the form of the step, the default first; fields of the algorithm's class.
    """

    name: str
    title: str
    paper: str
    family: str
    needs: tuple[Need, ...]
    forward: Literal["joint", "per-domain"]
    inference: str
    hyper: Mapping[str, float]
    options: Mapping[str, tuple[str, ...]]


class Algorithm(Protocol):
    """A training algorithm bound to a network and an optimiser."""

    @property
    def info(self) -> AlgorithmInfo:
        """Its metadata."""

    def init(self) -> State:
        """The state before the first step: a copy of the network's tensors, fresh slots."""

    def step(
        self, state: State, batch: Batch, hyper: Mapping[str, Tensor], rng: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        """One update.

        Args:
            state: of ``init`` or the step before; not changed.
            batch: windows of every source domain.
            hyper: "lr" and those named in ``info.hyper``, () float32 each.
            rng: () int64 key of this step's random numbers.

        Returns:
            New state and scalars: "loss" and "accuracy" at least.
        """


def initial_state(model: nn.Module, optimiser: Optimiser) -> State:
    """Copies of a network's parameters and buffers, with fresh optimiser slots."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    return State(params, buffers, optimiser.init(params), {})


def call(model: nn.Module, params: Tensors, buffers: Tensors, *args: object) -> tuple[Tensor, Tensors]:
    """Run a network on given tensors.

    Args:
        model: in training mode; its own tensors are not read.
        params: named parameters.
        buffers: named buffers; not changed.
        args: of ``model.forward``.

    Returns:
        What ``model`` returns, and the buffers after the pass.
    """
    tensors = {**params, **buffers}
    output: Tensor = functional_call(model, tensors, args)
    return output, {name: tensors[name] for name in buffers}


def descend(
    objective: Objective, state: State, optimiser: Optimiser, lr: Tensor
) -> tuple[State, dict[str, Tensor]]:
    """Differentiate an objective and make one optimiser step.

    Args:
        objective: loss, metrics and new buffers from parameters and buffers.
        state: to start from.
        optimiser: that makes the step.
        lr: () learning rate.

    Returns:
        New state (extras unchanged) and the metrics with "loss" added.
    """
    differentiate = _gradient if _transformed() else _tape_gradient
    grads, loss, metrics, buffers = differentiate(objective, state)
    params, slots = optimiser.update(state.params, grads, state.slots, lr)
    return State(params, buffers, slots, state.extras), {"loss": loss, **metrics}


def _gradient(objective: Objective, state: State) -> tuple[Tensors, Tensor, Tensors, Tensors]:
    """Gradients, loss, metrics, buffers, in a way that ``torch.func`` can transform: the reference."""
    grads, (loss, (metrics, buffers)) = grad_and_value(objective, has_aux=True)(state.params, state.buffers)
    return grads, loss, metrics, buffers


def _tape_gradient(objective: Objective, state: State) -> tuple[Tensors, Tensor, Tensors, Tensors]:
    """The same by plain autograd, which saves a fifth of a small step."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    with torch.enable_grad():
        loss, (metrics, buffers) = objective(leaves, state.buffers)
    grads = torch.autograd.grad(loss, tuple(leaves.values()))
    detached = {name: value.detach() for name, value in metrics.items()}
    return dict(zip(leaves, grads, strict=True)), loss.detach(), detached, buffers


def _transformed() -> bool:
    """Whether a transformation of ``torch.func`` or a trace is going on (torch has no public name for either)."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return transformed or torch._C._len_torch_dispatch_stack() > 0  # noqa: SLF001


def pooled(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """The windows of all domains as one batch: x (D*B, C, T), y (D*B,), weight (D*B,) or None."""
    weight = None if batch.weight is None else batch.weight.flatten()
    return batch.x.flatten(0, 1), batch.y.flatten(), weight


def features_of_domains(
    model: Classifier, params: Tensors, buffers: Tensors, batch: Batch, rng: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    """One pass a domain, each normalised by its own statistics; the running ones see the domains in turn.

    Args:
        model: in training mode.
        params: named parameters.
        buffers: named buffers; not changed.
        batch: (D, B) windows.
        rng: () int64 key; every domain gets a key of its own.

    Returns:
        features (D, B, F), logits (D, B, K), buffers after the passes.
    """
    network = _WithFeatures(model)
    tensors = {f"model.{name}": tensor for name, tensor in (*params.items(), *buffers.items())}
    keys = randomness.derive(rng, torch.arange(batch.y.shape[0], device=rng.device))
    passes: list[tuple[Tensor, Tensor]] = []
    for domain in range(batch.y.shape[0]):
        weight = None if batch.weight is None else batch.weight[domain]
        arguments = (batch.x[domain], weight, keys[domain])
        passes.append(functional_call(network, tensors, arguments))
    features, logits = (torch.stack(parts) for parts in zip(*passes, strict=True))
    return features, logits, {name: tensors[f"model.{name}"] for name in buffers}


class _WithFeatures(nn.Module):
    """A classifier that returns (features, logits)."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weight: Tensor | None, rng: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.features(x, weight, rng)
        return features, self.model.head(features)


def cross_entropy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over windows, nats.

    Args:
        logits: (B, K).
        y: (B,) int64.
        weight: (B,) weights, None for ones; the mean divides by their sum.

    Returns:
        ().
    """
    return domain_risks(logits[None], y[None], None if weight is None else weight[None])[0]


def domain_risks(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of every domain, nats.

    Args:
        logits: (D, B, K).
        y: (D, B) int64.
        weight: (D, B) weights, None for ones.

    Returns:
        (D,).
    """
    return soft_cross_entropy(logits, y, weight=weight)


def accuracy(logits: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of windows whose largest logit is the right one: (), for logits (..., K), y and weight (...)."""
    hits = (logits.detach().argmax(dim=-1) == y).to(logits.dtype)
    if weight is None:
        return hits.mean()
    return (hits * weight).sum() / torch.clamp(weight.sum(), min=1e-12)
