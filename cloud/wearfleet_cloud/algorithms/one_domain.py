"""Objectives of one source domain, for methods that go from domain to domain."""

from torch import Tensor
from wearfleet_models import Classifier

from wearfleet_cloud.algorithms.base import Batch, Tensors
from wearfleet_cloud.algorithms.gradients import Objective
from wearfleet_cloud.algorithms.losses import accuracy, cross_entropy
from wearfleet_cloud.algorithms.passes import call

__all__ = ["reordered", "risk_of"]


def reordered(batch: Batch, order: Tensor) -> Batch:
    """The domains of a batch in another order, (D,) int64."""
    weight = None if batch.weight is None else batch.weight.index_select(0, order)
    return Batch(batch.x.index_select(0, order), batch.y.index_select(0, order), weight)


def risk_of(model: Classifier, batch: Batch, domain: int, rng: Tensor) -> Objective:
    """Cross-entropy of a domain, normalised by its own batch, with the metric "accuracy".

    Args:
        model: in training mode.
        batch: windows of all domains.
        domain: which.
        rng: () int64 key of dropout masks.
    """
    x, y = batch.x[domain], batch.y[domain]
    weight = None if batch.weight is None else batch.weight[domain]

    def objective(params: Tensors, buffers: Tensors) -> tuple[Tensor, tuple[Tensors, Tensors]]:
        logits, after = call(model, params, buffers, x, weight, rng)
        return cross_entropy(logits, y, weight), ({"accuracy": accuracy(logits, y, weight)}, after)

    return objective
