"""Low-rank additions to attention: what is trained in place of a frozen projection.

Source: Hu et al. 2021, arXiv:2106.09685, equation 3 and section 4.2 (queries and values).
Differs: the scale alpha / r is a real number, also where r does not divide alpha; no dropout before A.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["LowRankQkv"]

_ALPHA: Final = 16.0


class LowRankQkv(nn.Linear):
    """Queries, keys and values of tokens: W x + b + (alpha / r) [B_q A_q x, 0, B_v A_v x].

    B is 0 at first, so that nothing changes until it is trained; A is random.

    Args:
        width: of a token.
        rank: r, at least 1.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, 3 * width)
        bound = 1.0 / math.sqrt(width)
        self.query_a = nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound))
        self.value_a = nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound))
        self.query_b = nn.Parameter(torch.zeros(width, rank))
        self.value_b = nn.Parameter(torch.zeros(width, rank))
        self.scale = _ALPHA / rank

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """(B, N, W) -> (B, N, 3 W)."""
        query = input @ self.query_a.T @ self.query_b.T
        value = input @ self.value_a.T @ self.value_b.T
        added = torch.cat((query, torch.zeros_like(query), value), dim=-1)
        return super().forward(input) + self.scale * added
