"""Margin losses by their definitions; the large margin with its norms from autograd."""

from typing import Final, Literal

import torch
from torch import Tensor

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "combine",
    "large_margin_reference",
    "replaced_cross_entropy_reference",
]

Aggregation = Literal["mean", "smallest", "each"]
AGGREGATIONS: Final[tuple[Aggregation, ...]] = ("mean", "smallest", "each")


def large_margin_reference(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    gamma: float,
    top_k: int,
    aggregation: Aggregation,
    floor: float,
) -> Tensor:
    """LM_ij = -clip(dist_ij, -3 gamma, gamma), dist the distance of window i to the border of its label j.

    p = softmax(W z + c). For the ``top_k`` classes k != y with the largest p: delta_k = p_y - p_k,
    g_k = |d delta_k / d z| (a constant), dist_k = delta_k / max(g_k + 1e-8, floor). "mean" and "smallest" combine
    dist_k before the clip, "each" is the mean of the clipped.

    Args:
        features: (N, F) z.
        weight: (K, F) W.
        bias: (K,) c.
        labels: (N, J) int64; every window is judged by each of its J labels.
        gamma: largest distance that is still rewarded.
        top_k: number of competing classes, at most K - 1.
        aggregation: of the competitors' distances.
        floor: of the norm.

    Returns:
        (N, J).

    Source: Lu et al. 2024, arXiv:2211.05228, equation 7, after Elsayed et al. 2018, arXiv:1803.05598; specs/ood.md 3.2.
    """
    free = features.detach().requires_grad_()
    with torch.enable_grad():
        shadow = torch.softmax(free @ weight.detach().T + bias.detach(), dim=-1)
    p = torch.softmax(features @ weight.T + bias, dim=-1)
    rows = torch.arange(len(p), device=p.device)
    columns = []
    for label in labels.unbind(1):
        rivals = p.detach().scatter(1, label[:, None], -1.0).topk(top_k, dim=1).indices
        distances = []
        for rival in rivals.unbind(1):
            gap = (shadow[rows, label] - shadow[rows, rival]).sum()
            norm = torch.autograd.grad(gap, free, retain_graph=True)[0].norm(dim=1)
            distances.append((p[rows, label] - p[rows, rival]) / (norm + 1e-8).clamp(min=floor))
        columns.append(combine(torch.stack(distances, dim=1), gamma, aggregation))
    return torch.stack(columns, dim=1)


def combine(distances: Tensor, gamma: float, aggregation: Aggregation) -> Tensor:
    """Distances to the competitors (..., top_k) -> loss (...)."""
    if aggregation == "each":
        return -distances.clamp(-3.0 * gamma, gamma).mean(dim=-1)
    combined = distances.mean(dim=-1) if aggregation == "mean" else distances.min(dim=-1).values
    return -combined.clamp(-3.0 * gamma, gamma)


def replaced_cross_entropy_reference(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy after the logit of the label was replaced, as every softmax with a margin does.

    Args:
        logits: (N, K).
        target: (N,) logit that the label gets in place of its own.
        labels: (N,) int64.

    Returns:
        (N,) lse(l') - target, l' = logits with l'_y = target; float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    replaced = logits.to(wide).scatter(1, labels[:, None], target[:, None].to(wide))
    return torch.nn.functional.cross_entropy(replaced, labels, reduction="none")
