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

    Computes in float32 or wider: the norms vanish where the softmax is sure of itself.

    Source: specs/ood.md 4.3, of all labels at once; its six terms are collected as H_cd = G_cd - q_c - q_d + s, the
    products of the rows of W minus their mean under p.
    """
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1)
    fixed, gram = p.detach(), gram.detach().to(p.dtype)
    q = fixed @ gram
    s = (fixed * q).sum(dim=1, keepdim=True)
    squares = gram.diagonal() - 2.0 * q + s
    open_to = fixed[:, None].expand(-1, labels.shape[1], -1).scatter(2, labels[..., None], -1.0)
    other, rivals = open_to.topk(top_k, dim=2)

    def of_label(values: Tensor) -> Tensor:
        return values.gather(1, labels)[..., None]

    def of_rivals(values: Tensor) -> Tensor:
        return values.gather(1, rivals.flatten(1)).unflatten(1, rivals.shape[1:])

    own = of_label(fixed)
    mixed = gram[labels[..., None], rivals] - of_label(q) - of_rivals(q) + s[..., None]
    square = own.square() * of_label(squares) + other * (other * of_rivals(squares) - 2.0 * own * mixed)
    norm = square.clamp(min=0.0).sqrt()
    return combine((of_label(p) - of_rivals(p)) / (norm + 1e-8).clamp(min=floor), gamma, aggregation)
