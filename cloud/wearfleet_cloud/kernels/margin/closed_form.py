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

    Source: specs/ood.md 4.3.
    """
    p = torch.softmax(logits, dim=-1)
    fixed, gram = p.detach(), gram.detach().to(p.dtype)
    q = fixed @ gram
    s = (fixed * q).sum(dim=1)[:, None]
    columns = []
    for label in labels.unbind(1):
        rivals = fixed.scatter(1, label[:, None], -1.0).topk(top_k, dim=1).indices
        own, other = fixed.gather(1, label[:, None]), fixed.gather(1, rivals)
        gap = own - other
        square = (
            own**2 * gram.diagonal()[label][:, None]
            + other**2 * gram.diagonal()[rivals]
            + gap**2 * s
            - 2.0 * own * other * gram[label[:, None], rivals]
            - 2.0 * own * gap * q.gather(1, label[:, None])
            + 2.0 * other * gap * q.gather(1, rivals)
        )
        norm = square.clamp(min=0.0).sqrt()
        distances = (p.gather(1, label[:, None]) - p.gather(1, rivals)) / (norm + 1e-8).clamp(min=floor)
        columns.append(combine(distances, gamma, aggregation))
    return torch.stack(columns, dim=1)
