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
    # classes first and windows side by side: along few classes torch uses no vector registers
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)).T.contiguous(), dim=0)
    fixed, gram, by_label = p.detach(), gram.detach().to(p.dtype), labels.T.contiguous()
    top = fixed.max(dim=0, keepdim=True).indices
    to_top, length = gram.index_select(1, top[0]), gram.diagonal()[top]
    rest = fixed.scatter(0, top, 0.0)
    q = gram @ rest - to_top * rest.sum(dim=0, keepdim=True)
    q = q - q.gather(0, top)
    s = (rest * q).sum(dim=0, keepdim=True)
    # the order of the differences makes whatever belongs to the origin exactly 0
    squares = (gram.diagonal()[:, None] - 2.0 * to_top + length) - 2.0 * q + s

    def of_label(values: Tensor) -> Tensor:
        return values.gather(0, by_label)[:, None]

    own, with_label = of_label(fixed), gram[:, by_label].transpose(0, 1)
    mixed = (with_label - of_label(to_top)) - (to_top - length) - q - of_label(q - s)
    square = own.square() * of_label(squares) + fixed.square() * squares - (2.0 * own * fixed) * mixed
    norm = (square.clamp(min=0.0).sqrt() + 1e-8).clamp(min=floor)
    others = fixed.T[:, None].expand(*labels.shape, -1).scatter(2, labels[..., None], -1.0)
    rivals = others.topk(top_k, dim=2).indices.permute(1, 2, 0)
    return combine(((of_label(p) - p) / norm).gather(1, rivals).movedim(1, 2), gamma, aggregation).T
