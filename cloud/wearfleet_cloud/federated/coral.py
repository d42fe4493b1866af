"""Fine-tuning towards features that correlate as everyone's do: FedHealth's transfer step without anyone's features.

CORAL needs the covariance of the others' features, which would take F^2 numbers of every client and, on small data,
tell much of it. What is shared here is the covariance of a random projection of the embedding to a few numbers, one
matrix a client, pooled by the server before anyone gets it: no window and no feature leaves a device. The projection is
the same for all, a constant of the graphs.

Source: Chen et al. 2020, arXiv:1907.09173, section 3.4 (the transfer step of FedHealth); Sun and Saenko 2016,
arXiv:1607.01719, equation 1; specs/federated.md section 5.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor
from wearfleet_models import randomness
from wearfleet_models.classifier import Classifier
from wearfleet_models.layers import BatchNorm
from wearfleet_models.roles import tensor_specs
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.client_program import PERSONAL_PREFIX, ClientPhase, on_track, personal_specs
from wearfleet_cloud.federated.client_steps import Tensors, embedding_of, training_step, weighted_mean
from wearfleet_cloud.federated.training_options import LocalTraining

__all__ = ["COVARIANCE", "MEAN", "SHARED", "finetuning_phase", "projected_phase"]

MEAN: Final = "projected/mean"
COVARIANCE: Final = "projected/covariance"
SHARED: Final = "shared_covariance"
"""Of everyone together; global, zero until there is one."""

_COUNT: Final = "projected_count"
_WIDTH: Final = 32
_KEY: Final = 2016
_WEIGHT: Final = "coral_weight"


def projected_phase(
    model: Classifier, local: LocalTraining
) -> tuple[ClientPhase, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Mean (d,) and covariance (d, d) of all training windows' projected embeddings, pooled batch by batch.

    Returns:
        The phase, what it uploads, and what else it needs.
    """
    projection, embedding = _projection(model), embedding_of(model)
    width, names = projection.shape[1], [spec.name for spec in tensor_specs(model)]

    def step(given: Tensors) -> Tensors:
        batch = given["weight"].sum()
        count = given[_COUNT] + batch
        share = batch / torch.clamp(count, min=1.0)
        projected = embedding({name: given[name] for name in names}, given["x"]) @ projection
        mean, covariance = _moments(projected, given["weight"] / torch.clamp(batch, min=1.0))
        apart = mean - given[MEAN]
        spread = share * (1.0 - share) * apart[:, None] * apart[None, :]
        return {
            _COUNT: count,
            MEAN: given[MEAN] + share * apart,
            COVARIANCE: given[COVARIANCE] + share * (covariance - given[COVARIANCE]) + spread,
        }

    loop = replace(local.train_loop(), epochs=1, max_steps=0, shuffle=False)
    sent = tuple(
        TensorSpec(name, "float32", shape, TensorRole.AUX, TensorGroup.AUX, "zeros")
        for name, shape in ((MEAN, (width,)), (COVARIANCE, (width, width)))
    )
    return ClientPhase("project", step, loop, ()), sent, (_counter(),)


def finetuning_phase(
    model: Classifier, local: LocalTraining, weight: float
) -> tuple[ClientPhase, tuple[TensorSpec, ...]]:
    """Epochs of the personal track's last layer and head on CE + weight / (4 d^2) ||C_shared - C_batch||_F^2.

    The layers below are frozen, and normalisation goes by its running statistics, which stay. Before there is a shared
    covariance the term is 0.

    Returns:
        The phase, and what it needs: the personal track, the shared covariance and the optimiser's tensors.
    """
    projection = _projection(model)
    width = projection.shape[1]
    tuned = _last_layers(model)
    specs = [
        replace(spec, role=TensorRole.SHARED if spec.name in tuned else TensorRole.FROZEN)
        for spec in tensor_specs(model)
    ]

    def loss(features: Tensor, logits: Tensor, given: Tensors) -> Tensor:
        chosen = (given["y"][:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
        risk = weighted_mean(-(torch.log_softmax(logits, dim=1) * chosen).sum(dim=1), given)
        share = given["weight"] / torch.clamp(given["weight"].sum(), min=1.0)
        apart = _moments(features @ projection, share)[1] - given[SHARED]
        known = (given[SHARED].abs().sum() > 0).to(logits.dtype)
        return risk + known * given[_WEIGHT] * (apart * apart).sum() / (4.0 * width * width)

    step, slots = training_step(_steady(model), specs, local.build(), roles=(TensorRole.SHARED,), loss=loss)
    # the role of what never leaves a device; AUX is uploaded here
    own = [replace(spec, role=TensorRole.CLIENT_EMB) for spec in personal_specs(model, "copy")]
    step = on_track(step, [slot.name for slot in slots], "finetune/")
    step = on_track(step, [spec.copy_of for spec in own], PERSONAL_PREFIX)
    named = tuple(replace(slot, name=f"finetune/{slot.name}") for slot in slots)
    shared = TensorSpec(SHARED, "float32", (width, width), TensorRole.AUX, TensorGroup.ANCHOR)
    scalars = (("learning_rate", local.learning_rate), (_WEIGHT, weight))
    return ClientPhase("finetune", step, local.train_loop(), scalars), (*own, shared, *named)


class _SteadyNorm(BatchNorm):
    """Batch normalisation by the running statistics, also where the rest of the network trains."""

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:  # noqa: ARG002 - one signature
        """(B, C, T) or (B, C) -> the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _steady(model: Classifier) -> Classifier:
    copied = copy.deepcopy(model)
    for owner in list(copied.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, BatchNorm):
                setattr(owner, name, _SteadyNorm(child.num_features, eps=child.eps))
    return copied


def _last_layers(model: Classifier) -> frozenset[str]:
    """Names of the head's parameters and of those of the last layer before it."""
    roles = {spec.name: spec.role for spec in tensor_specs(model) if spec.group == TensorGroup.PARAM}
    layers: list[Sequence[str]] = []
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if own and {roles[name] for name in own} == {TensorRole.SHARED}:
            layers.append(own)
    head = [name for name, role in roles.items() if role == TensorRole.HEAD]
    return frozenset((*head, *(layers[-1] if layers else ())))


def _projection(model: Classifier) -> Tensor:
    """(F, d) of +-1 / sqrt(d); the embedding's own numbers where they are few."""
    features: int = model.head.in_features
    device = next(model.parameters()).device
    if features <= _WIDTH:
        return torch.eye(features, device=device)
    drawn = randomness.bits(torch.tensor(_KEY), 0, (features, _WIDTH)) % 2
    return ((2.0 * drawn - 1.0) / math.sqrt(_WIDTH)).to(torch.float32).to(device)


def _moments(values: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of (B, d) whose rows have (B,) shares."""
    mean = (values * share[:, None]).sum(dim=0)
    centred = values - mean
    return mean, (centred * share[:, None]).T @ centred


def _counter() -> TensorSpec:
    return TensorSpec(_COUNT, "float32", (), TensorRole.AUX, TensorGroup.OPTIMISER, "zeros")
