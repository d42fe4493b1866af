"""What the contrastive losses need of all pairs of rows, from the whole matrix of similarities."""

import torch
from torch import Tensor

__all__ = ["sigmoid_losses_reference", "similarities", "softmax_statistics_reference"]


def similarities(x: Tensor, y: Tensor, scale_x: Tensor, scale_y: Tensor) -> Tensor:
    """s_ij = scale_x_i scale_y_j x_i . y_j, (M, N); the scales hold inverse norms and the inverse temperature."""
    return scale_x[:, None] * (x @ y.T) * scale_y[None]


def softmax_statistics_reference(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
    without_self: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the columns j that row i is compared with: label not negative, and j != i with ``without_self``.

    Args:
        x: (M, F).
        y: (N, F).
        scale_x: (M,).
        scale_y: (N,).
        labels_x: (M,) int64; a row with a negative label has no positives.
        labels_y: (N,) int64; a column with a negative label is absent.
        without_self: rows and columns are the same windows.

    Returns:
        log sum_j exp s_ij (-inf for a row without columns); sum of s_ij over the positives, columns with the label of
        the row; their number; the largest s_ij over all present columns, the row itself included. All (M,); the last
        two are constants.
    """
    s = similarities(x, y, scale_x, scale_y)
    present = (labels_y >= 0)[None].expand(s.shape)
    compared = present
    if without_self:
        compared = present & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    positive = compared & (labels_x[:, None] == labels_y[None])
    lse = torch.logsumexp(torch.where(compared, s, -torch.inf), dim=1)
    largest = torch.where(present, s.detach(), -torch.inf).max(dim=1).values
    return lse, torch.where(positive, s, 0.0).sum(dim=1), positive.sum(dim=1).to(s.dtype), largest


def sigmoid_losses_reference(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor,
    scale_y: Tensor,
    bias: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
) -> Tensor:
    """sum_j -log sigmoid(z_ij (s_ij + bias)), z 1 where the labels are equal, else -1; over present columns.

    Args:
        x: (M, F).
        y: (N, F).
        scale_x: (M,).
        scale_y: (N,).
        bias: ().
        labels_x: (M,) int64; a row with a negative label is absent and costs 0.
        labels_y: (N,) int64; likewise.

    Returns:
        (M,).
    """
    s = similarities(x, y, scale_x, scale_y) + bias
    sign = torch.where(labels_x[:, None] == labels_y[None], 1.0, -1.0)
    present = (labels_x >= 0)[:, None] & (labels_y >= 0)[None]
    return torch.where(present, torch.nn.functional.softplus(-sign * s), 0.0).sum(dim=1)
