"""Attention of several heads, from projected queries, keys and values to mixed tokens."""

import math

import torch
from torch import Tensor

__all__ = ["attend"]


def attend(qkv: Tensor, heads: int, *, scale: float, reach: int | None = None) -> Tensor:
    """softmax(Q K^T / scale) V of every head.

    Args:
        qkv: (B, N, 3 W) queries, keys and values of N tokens, side by side.
        heads: that share the width W.
        scale: what the scores are divided by, usually the square root of a head's width.
        reach: tokens attend to those at most so many places away; None for all.

    Returns:
        (B, N, W), the heads side by side.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """
    batch, count, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    split = qkv.reshape(batch, count, 3, heads, width // heads)
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, W / heads)
    scores = query @ key.transpose(-1, -2) / scale
    if reach is not None and count > reach + 1:
        place = torch.arange(count, device=qkv.device)
        near = (place[:, None] - place[None, :]).abs() <= reach
        scores = torch.where(near, scores, -math.inf)
    mixed: Tensor = torch.softmax(scores, dim=-1) @ value
    return mixed.transpose(1, 2).reshape(batch, count, width)
