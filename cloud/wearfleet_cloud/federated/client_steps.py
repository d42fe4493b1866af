"""The pure steps of a client: gradients of a batch, an optimiser's update, a measurement."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from wearfleet_models.classifier import Classifier
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.plan_compiler import Step
from wearfleet_cloud.training.optimisers import Optimiser

__all__ = [
    "TRAINED_ROLES",
    "Direction",
    "GradientRule",
    "Loss",
    "Tensors",
    "WithEmbedding",
    "called",
    "cross_entropy",
    "embedding_of",
    "evaluation_step",
    "is_trained",
    "loss_gradient",
    "metrics_of",
    "optimising_step",
    "ruled",
    "training_step",
    "update_groups",
    "weighted_mean",
]

Tensors = dict[str, Tensor]

GradientRule = Callable[[Tensors, Tensors, Tensors], Tensors]
"""From gradients, parameters and everything the step was given to the gradients that the optimiser sees."""

Direction = Callable[[Tensors, Tensors], tuple[Tensors, Tensors, Tensors]]
"""From parameters and everything the step was given to what the optimiser takes for gradients, the buffers that
changed, and metrics."""

Loss = Callable[[Tensor, Tensor, Tensors], Tensor]
"""From embedding (B, F), logits (B, K) and everything the step was given to the loss of a batch."""

TRAINED_ROLES = (TensorRole.SHARED, TensorRole.NORM_AFFINE, TensorRole.HEAD)
_PACKED = "packed"
_LARGE_PARAMETER = 16_384
"""Elements from which a parameter is updated on its own; smaller ones are updated as one vector, because the fixed
cost of a graph node outweighs their arithmetic, and copying a large one outweighs the node."""


def evaluation_step(model: nn.Module) -> Step:
    """Loss and hits of a batch in evaluation mode.

    Returns:
        A step whose results are ``loss_sum`` (nats), ``correct`` and ``count``, each weighted by window.
    """
    evaluated = copy.deepcopy(model).eval()
    names = tuple(evaluated.state_dict())

    def step(given: Tensors) -> Tensors:
        logits = functional_call(evaluated, {name: given[name] for name in names}, (given["x"],))
        return metrics_of(logits, cross_entropy(logits, given["y"]), given)

    return step


def training_step(
    model: Classifier,
    specs: Sequence[TensorSpec],
    optimiser: Optimiser,
    rule: GradientRule | None = None,
    *,
    roles: Collection[TensorRole] = TRAINED_ROLES,
    loss: Loss | None = None,
) -> tuple[Step, tuple[TensorSpec, ...]]:
    """One optimiser step on a loss of a batch.

    Args:
        model: the classifier; it is copied.
        specs: its tensors.
        optimiser: pure update.
        rule: changes the gradients before the optimiser.
        roles: of the parameters that are trained. Without SHARED the network is in evaluation mode: nothing of what is
            frozen changes, statistics of normalisation neither.
        loss: None for the weighted mean cross-entropy.

    Returns:
        The step, and the specifications of the optimiser's tensors. Results are the new parameters, the buffers that
        changed, the optimiser's tensors, and the metrics of ``evaluation_step`` on the batch before the update.
    """
    return optimising_step(specs, optimiser, ruled(loss_gradient(model, specs, roles, loss), rule), roles)


def ruled(gradient: Direction, rule: GradientRule | None) -> Direction:
    """A gradient, changed by a rule if there is one."""

    def direction(params: Tensors, given: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        grads, buffers, metrics = gradient(params, given)
        return (grads if rule is None else rule(grads, params, given)), buffers, metrics

    return direction


def loss_gradient(
    model: Classifier,
    specs: Sequence[TensorSpec],
    roles: Collection[TensorRole] = TRAINED_ROLES,
    loss: Loss | None = None,
) -> Direction:
    """The gradient of a loss of a batch with respect to the parameters of some roles.

    Args:
        model: the classifier; it is copied. Where its backbone is frozen, or SHARED is not among the roles, it is in
            evaluation mode.
        specs: its tensors.
        roles: of the parameters.
        loss: None for the weighted mean cross-entropy.
    """
    trains = TensorRole.SHARED in roles and model.spec.frozen == "none"
    trained = WithEmbedding(copy.deepcopy(model).train(trains))
    rest = tuple(spec.name for spec in specs if not is_trained(spec, roles))

    def gradient(params: Tensors, given: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        fixed = {name: given[name] for name in rest}

        def objective(params: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
            tensors = trained.names({**params, **fixed})
            arguments = (given["x"], given["weight"], given["rng"])
            features, logits = functional_call(trained, tensors, arguments)
            losses = cross_entropy(logits, given["y"])
            value = weighted_mean(losses, given) if loss is None else loss(features, logits, given)
            after = {name: tensors[WithEmbedding.PREFIX + name] for name in rest}
            changed = {name: tensor for name, tensor in after.items() if tensor is not fixed[name]}
            return value, (changed, metrics_of(logits.detach(), losses.detach(), given))

        grads, (_, (buffers, metrics)) = grad_and_value(objective, has_aux=True)(params)
        return grads, buffers, metrics

    return gradient


def called(network: Classifier, method: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Tensor], Tensor]:
    """A method of a classifier, or of a part of it, as a function of named tensors and its argument.

    Args:
        network: whose names the tensors have; others are ignored.
        method: of one tensor; it uses ``network``.
    """
    names = tuple(network.state_dict())
    module = _Method(network, method)

    def call(tensors: Tensors, argument: Tensor) -> Tensor:
        own = {_Method.PREFIX + name: tensors[name] for name in names}
        result: Tensor = functional_call(module, own, (argument,))
        return result

    return call


def embedding_of(model: Classifier) -> Callable[[Tensors, Tensor], Tensor]:
    """From tensors of a model and windows (B, C, T) to their embedding (B, F) in evaluation mode; no gradient."""
    network = copy.deepcopy(model).eval()
    features = called(network, network.features)
    return lambda tensors, x: features(tensors, x).detach()


def weighted_mean(losses: Tensor, given: Tensors) -> Tensor:
    """The mean of (B,) values, each by the weight of its window."""
    return (losses * given["weight"]).sum() / torch.clamp(given["weight"].sum(), min=1e-12)


class _Method(nn.Module):
    PREFIX: ClassVar[str] = "network."

    def __init__(self, network: Classifier, method: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, argument: Tensor) -> Tensor:
        return self.method(argument)


class WithEmbedding(nn.Module):
    """A classifier that returns its embedding beside its logits."""

    PREFIX: ClassVar[str] = "network."

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def names(self, tensors: Tensors) -> Tensors:
        """The tensors of the classifier under the names they have here."""
        return {self.PREFIX + name: tensor for name, tensor in tensors.items()}

    def forward(self, x: Tensor, weight: Tensor | None, rng: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, C, T) -> (B, F) and (B, K)."""
        features = self.network.features(x, weight, rng)
        return features, self.network.classify(features)


def optimising_step(
    specs: Sequence[TensorSpec],
    optimiser: Optimiser,
    direction: Direction,
    roles: Collection[TensorRole] = TRAINED_ROLES,
) -> tuple[Step, tuple[TensorSpec, ...]]:
    """One optimiser step along a direction; see :func:`training_step`."""
    weights = {spec.name: spec.shape for spec in specs if is_trained(spec, roles)}
    groups = update_groups(weights)

    def step(given: Tensors) -> Tensors:
        params = {name: given[name] for name in weights}
        grads, buffers, metrics = direction(params, given)
        return {**_update(optimiser, groups, params, grads, given), **buffers, **metrics}

    return step, _slot_specs(optimiser, weights, groups)


def is_trained(spec: TensorSpec, roles: Collection[TensorRole] = TRAINED_ROLES) -> bool:
    """Whether a tensor is a parameter of these roles."""
    return spec.group == TensorGroup.PARAM and spec.role in roles


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,) nats; written with a comparison, whose gradient needs no scatter."""
    chosen = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
    return -(torch.log_softmax(logits, dim=1) * chosen).sum(dim=1)


def metrics_of(logits: Tensor, losses: Tensor, given: Tensors) -> Tensors:
    """``loss_sum``, ``correct`` and ``count`` of (B, K) logits and (B,) losses, weighted by window."""
    weight = given["weight"]
    hits = (logits.argmax(dim=1) == given["y"]).to(weight.dtype)
    return {
        "loss_sum": (losses * weight).sum(),
        "correct": (hits * weight).sum(),
        "count": weight.sum(),
    }


def update_groups(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Names of the parameters that are updated together, by the name of the group."""
    large = {
        name: (name,) for name, shape in weights.items() if torch.Size(shape).numel() >= _LARGE_PARAMETER
    }
    small = tuple(name for name in weights if name not in large)
    return {**large, **({_PACKED: small} if small else {})}


def _slot_specs(
    optimiser: Optimiser, weights: Mapping[str, tuple[int, ...]], groups: Mapping[str, tuple[str, ...]]
) -> tuple[TensorSpec, ...]:
    vectors = {
        group: torch.zeros(sum(torch.Size(weights[name]).numel() for name in names))
        for group, names in groups.items()
    }
    return tuple(
        TensorSpec(name, "float32", tuple(slot.shape), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros")
        for name, slot in optimiser.init(vectors).items()
    )


def _update(
    optimiser: Optimiser,
    groups: Mapping[str, tuple[str, ...]],
    params: Tensors,
    grads: Tensors,
    given: Tensors,
) -> Tensors:
    """Every group by the optimiser as one vector; new parameters in their shapes and new slots."""
    parts: list[Tensors] = []
    for group, names in groups.items():
        vectors, slots = optimiser.update(
            {group: torch.cat([params[name].reshape(-1) for name in names])},
            {group: torch.cat([grads[name].reshape(-1) for name in names])},
            given,
            given["learning_rate"],
        )
        pieces = torch.split(vectors[group], [params[name].numel() for name in names])
        parts.append(
            {name: piece.reshape(params[name].shape) for name, piece in zip(names, pieces, strict=True)}
        )
        parts.append(slots)
    updated = dict(chain.from_iterable(part.items() for part in parts))
    return {name: updated[name] for name in (*params, *(n for n in updated if n not in params))}
