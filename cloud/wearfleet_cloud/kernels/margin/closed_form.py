"""The large margin without autograd: norms from the classifier's Gram matrix."""

import torch
from torch import Tensor

from wearfleet_cloud.kernels.margin.reference import Aggregation, combine

__all__ = ["large_margin_closed"]


def large_margin_closed(
    logits: Tensor,
    gram: Tensor,
    labels: Tensor,
    gamma: float,
    top_k: int,
    aggregation: Aggregation,
    floor: float,
) -> Tensor:
    """Equal to ``large_margin_reference`` at ``logits = z W^T + c`` and ``gram = W W^T``; derivation in README.md.

    Computes in float32 or wider, with the row of the most probable class as the origin of the rows of W: the norms
    do not depend on it, and where the softmax is sure of itself nothing large is left that would cancel.

    Source: specs/ood.md 4.3. Differs: the origin.
    """
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    fixed, gram = p.detach(), gram.detach().to(p.dtype)
    top = fixed.argmax(dim=1, keepdim=True)
    to_top, length = gram[top[:, 0]], gram.diagonal()[top]
    rest = fixed.scatter(1, top, 0.0)
    q = rest @ gram - to_top * rest.sum(dim=1, keepdim=True)
    q = q - q.gather(1, top)
    s = (rest * q).sum(dim=1, keepdim=True)
    # the order of the differences makes whatever belongs to the origin exactly 0
    squares = (gram.diagonal() - 2.0 * to_top + length) - 2.0 * q + s

    def of_label(values: Tensor) -> Tensor:
        return values.gather(1, labels)[..., None]

    own, other = of_label(fixed), fixed[:, None]
    mixed = (gram[labels] - of_label(to_top)) - (to_top - length)[:, None] - q[:, None] - of_label(q - s)
    square = own.square() * of_label(squares) + (fixed.square() * squares)[:, None]
    square = square - (2.0 * own * other) * mixed
    norm = (square.clamp(min=0.0).sqrt() + 1e-8).clamp(min=floor)
    rivals = other.expand_as(mixed).scatter(2, labels[..., None], -1.0).topk(top_k, dim=2).indices
    return combine(((of_label(p) - p[:, None]) / norm).gather(2, rivals), gamma, aggregation)
