"""Entropic optimal transport in the log domain, full and partial, from the whole cost matrix."""

from typing import Final, Literal

import torch
from torch import Tensor

__all__ = [
    "LEAST_MASS",
    "METRICS",
    "Metric",
    "costs",
    "group_lasso_reference",
    "plan_of",
    "potentials",
    "transport_reference",
]

Metric = Literal["squared", "euclidean"]
METRICS: Final[tuple[Metric, ...]] = ("squared", "euclidean")
LEAST_MASS: Final = 1e-30
"""A point without mass gets this, whose logarithm is finite: it moves nothing that float32 could see."""
LEAST_DISTANCE: Final = 1e-6
"""Below it the gradient of a distance, undefined at 0, is cut off."""


def costs(x: Tensor, y: Tensor, metric: Metric, prior: Tensor | None = None) -> Tensor:
    """|x_i - y_j|^2 or |x_i - y_j|, plus the prior: (Q, N, F), (Q, M, F) -> (Q, N, M).

    From products of points around the mean of x: rounding grows with the spread of the points, not with their offset.
    """
    middle = x.detach().mean(dim=1, keepdim=True)
    x, y = x - middle, y - middle
    squares = x.square().sum(dim=2)[:, :, None] + y.square().sum(dim=2)[:, None] - 2.0 * x @ y.transpose(1, 2)
    squares = squares.clamp(min=0.0)
    if metric == "euclidean":
        squares = squares.clamp(min=LEAST_DISTANCE**2).sqrt()
    return squares if prior is None else squares + prior


def potentials(cost: Tensor, a: Tensor, b: Tensor, mass: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Alternating updates u_i = log a_i - LSE_j(v_j - c_ij), v_j = log b_j - LSE_i(u_i - c_ij), from v = 0.

    For a mass below 1 every row may also send to a dummy column at cost 0, which takes 1 - mass, and likewise every
    column; dummy to dummy is forbidden.

    Args:
        cost: (Q, N, M) already divided by the regularisation.
        a: (Q, N) masses that sum to 1.
        b: (Q, M) likewise.
        mass: to be moved, above 0 to 1.
        iterations: of both updates.

    Returns:
        u (Q, N) and v (Q, M); the plan is exp(u_i + v_j - c_ij).

    Source: Peyre and Cuturi 2019, arXiv:1803.00567, remark 4.23; Chapel et al. 2020, arXiv:2002.08276, section 3 (dummy
    point); specs/extended.md 8.2.
    """
    log_a, log_b = a.clamp(min=LEAST_MASS).log(), b.clamp(min=LEAST_MASS).log()
    v = torch.zeros_like(b)
    dummy_v = torch.zeros_like(b[:, :1])
    rest = None if mass >= 1.0 else torch.log(torch.full_like(dummy_v, 1.0 - mass))
    u = torch.zeros_like(a)
    for _ in range(iterations):
        incoming = torch.logsumexp(v[:, None] - cost, dim=2)
        u = log_a - (incoming if rest is None else torch.logaddexp(incoming, dummy_v))
        outgoing = torch.logsumexp(u[:, :, None] - cost, dim=1)
        if rest is None:
            v = log_b - outgoing
        else:
            dummy_u = rest - torch.logsumexp(v, dim=1, keepdim=True)
            v = log_b - torch.logaddexp(outgoing, dummy_u)
            dummy_v = rest - torch.logsumexp(u, dim=1, keepdim=True)
    return u, v


def plan_of(cost: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """exp(u_i + v_j - c_ij), (Q, N, M)."""
    return torch.exp(u[:, :, None] + v[:, None] - cost)


def transport_reference(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    prior: Tensor | None,
    epsilon: float,
    mass: float,
    iterations: int,
    metric: Metric,
) -> Tensor:
    """sum_ij plan_ij c_ij, c the costs over their mean, the plan and the mean taken as constants.

    By the envelope theorem that is the gradient of the regularised problem's optimum.

    Args:
        x: (Q, N, F).
        y: (Q, M, F).
        a: (Q, N) masses that sum to 1.
        b: (Q, M) likewise.
        prior: (Q, N, M) added to the costs, or None.
        epsilon: regularisation, in units of the mean cost.
        mass: to be moved, above 0 to 1.
        iterations: of both updates.
        metric: of the features.

    Returns:
        (Q,).
    """
    cost = costs(x, y, metric, prior)
    cost = cost / cost.detach().mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    with torch.no_grad():
        scaled = cost / epsilon
        plan = plan_of(scaled, *potentials(scaled, a, b, mass, iterations))
    return (plan * cost).sum(dim=(1, 2))


def group_lasso_reference(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    groups: Tensor,
    epsilon: Tensor,
    eta: Tensor,
    outer: int,
    iterations: int,
) -> Tensor:
    """Plan of entropic transport with a penalty that lets every column receive from few groups.

    ``outer`` times: the plan for cost + eta W, then W_ij = 0.5 (s_gj + 1e-3)^(-1/2), s_gj what column j gets from the
    group of row i. W begins at 0.

    Args:
        cost: (Q, N, M).
        a: (Q, N) masses that sum to 1.
        b: (Q, M) likewise.
        groups: (Q, N) int64, not negative.
        epsilon: (Q,) regularisation.
        eta: (Q,) weight of the penalty.
        outer: steps of majorisation.
        iterations: of both updates, in every step.

    Returns:
        (Q, N, M) plan of the last step.

    Source: Courty et al. 2017, arXiv:1507.00504, section 4.2; specs/ood.md 3.7 step 5.
    """
    same = (groups[:, :, None] == groups[:, None]).to(cost.dtype)
    penalty = torch.zeros_like(cost)
    plan = penalty
    for _ in range(outer):
        scaled = (cost + eta[:, None, None] * penalty) / epsilon[:, None, None]
        plan = plan_of(scaled, *potentials(scaled, a, b, 1.0, iterations))
        penalty = 0.5 * (same @ plan + 1e-3).rsqrt()
    return plan
