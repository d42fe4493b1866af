"""Entropic optimal transport between two sets of points; the maths is in README.md."""

import torch
from torch import Tensor
from wearfleet_protos.errors import ConfigError, ShapeError

from wearfleet_cloud.kernels.dispatch import takes_triton
from wearfleet_cloud.kernels.sinkhorn.reference import (
    METRICS,
    Metric,
    costs,
    group_lasso_reference,
    plan_of,
    potentials,
    transport_reference,
)

__all__ = [
    "METRICS",
    "Metric",
    "group_lasso_plan",
    "group_lasso_reference",
    "transport_loss",
    "transport_plan",
    "transport_reference",
]


def transport_loss(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    prior: Tensor | None = None,
    epsilon: float = 0.05,
    mass: float = 1.0,
    iterations: int = 50,
    metric: Metric = "squared",
) -> Tensor:
    """Cost of moving ``mass`` of one set of points onto another, over the mean cost of a pair.

    The gradient holds the plan fixed (envelope theorem). On a GPU neither costs nor plan are written. Works under
    ``torch.func.grad`` and ``vmap``.

    Args:
        x: (Q, N, F) points of Q problems.
        y: (Q, M, F).
        a: (Q, N) masses that sum to 1, 0 for padding; None for even ones. No gradient.
        b: (Q, M) likewise.
        prior: (Q, N, M) added to the costs, such as gamma (t_i - t_j)^2; None for 0. No gradient.
        epsilon: regularisation in units of the mean cost, above 0.
        mass: above 0 to 1; below 1 points may stay unmatched.
        iterations: at least 1, always all of them: nothing is read back to see whether they converged.
        metric: "squared" or "euclidean" distance.

    Returns:
        (Q,).

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: a number out of its range or an unknown metric.

    Source: Cuturi 2013, arXiv:1306.0895; partial: specs/extended.md 8.2.
    """
    a, b = _check(x, y, a, b, prior, epsilon, mass, iterations, metric)
    if takes_triton(x, y, a, b, *([] if prior is None else [prior])):
        from wearfleet_cloud.kernels.sinkhorn import kernel  # noqa: PLC0415  only where Triton is

        return kernel.transport_triton(x, y, a, b, prior, epsilon, mass, iterations, metric)[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    return transport_reference(x.to(wide), y.to(wide), a, b, prior, epsilon, mass, iterations, metric)


def transport_plan(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    prior: Tensor | None = None,
    epsilon: float = 0.05,
    mass: float = 1.0,
    iterations: int = 50,
    metric: Metric = "squared",
) -> Tensor:
    """The plan itself, of the same problem: (Q, N, M), rows sum to at most a, all to ``mass``; a constant.

    Arguments and errors as ``transport_loss``. What its sums miss of a, b and ``mass`` tells how far it has converged.
    Works under ``torch.func.vmap``.
    """
    a, b = _check(x, y, a, b, prior, epsilon, mass, iterations, metric)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        cost = costs(x.to(wide), y.to(wide), metric, prior)
        if takes_triton(x, y, a, b, *([] if prior is None else [prior])):
            from wearfleet_cloud.kernels.sinkhorn import kernel  # noqa: PLC0415  only where Triton is

            _, u, v, mean = kernel.transport_triton(x, y, a, b, prior, epsilon, mass, iterations, metric)
            return plan_of(cost / (mean * epsilon)[:, None, None], u, v)
        scaled = cost / (cost.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12) * epsilon)
        return plan_of(scaled, *potentials(scaled, a, b, mass, iterations))


def group_lasso_plan(
    cost: Tensor,
    groups: Tensor,
    *,
    epsilon: Tensor,
    eta: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    outer: int = 10,
    iterations: int = 200,
) -> Tensor:
    """Plan of a transport in which every column prefers to receive from one group of rows.

    Works under ``torch.func.vmap``.

    Args:
        cost: (Q, N, M).
        groups: (Q, N) int64 class of every row, not negative.
        epsilon: (Q,) regularisation, above 0.
        eta: (Q,) weight of the penalty.
        a: (Q, N) masses that sum to 1; None for even ones.
        b: (Q, M) likewise.
        outer: steps of majorisation, at least 1.
        iterations: in every step, at least 1.

    Returns:
        (Q, N, M), float32 or wider, a constant; columns sum to b.

    Raises:
        ShapeError: shapes that do not fit each other.
        ConfigError: no step.

    Source: Courty et al. 2017, arXiv:1507.00504; specs/ood.md 3.7.
    """
    if cost.dim() != 3 or 0 in cost.shape or groups.shape != cost.shape[:2]:
        raise ShapeError(
            f"cost must be (problems, N, M) and groups (problems, N), got {tuple(cost.shape)} and {tuple(groups.shape)}"
        )
    if epsilon.shape != cost.shape[:1] or eta.shape != cost.shape[:1]:
        raise ShapeError(
            f"epsilon and eta must be ({len(cost)},), got {tuple(epsilon.shape)}, {tuple(eta.shape)}"
        )
    if outer < 1 or iterations < 1:
        raise ConfigError(
            f"group lasso needs at least one step of one iteration, got {outer} and {iterations}"
        )
    a, b = _masses(cost[:, :, 0], a, "a"), _masses(cost[:, 0], b, "b")
    with torch.no_grad():
        if takes_triton(cost, a, b, groups, epsilon, eta):
            from wearfleet_cloud.kernels.sinkhorn import kernel, kernel_group_lasso  # noqa: PLC0415  only where Triton is

            if max(cost.shape[1:]) <= kernel.MOST_SMALL:
                return kernel_group_lasso.group_lasso_triton(
                    cost, a, b, groups, epsilon, eta, outer, iterations
                )
        cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
        return group_lasso_reference(cost, a, b, groups, epsilon, eta, outer, iterations)


def _check(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    prior: Tensor | None,
    epsilon: float,
    mass: float,
    iterations: int,
    metric: Metric,
) -> tuple[Tensor, Tensor]:
    if x.dim() != 3 or y.dim() != 3 or x.shape[::2] != y.shape[::2] or 0 in x.shape or 0 in y.shape:
        raise ShapeError(
            f"points must be (problems, N, F) and (problems, M, F), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if prior is not None and prior.shape != (len(x), x.shape[1], y.shape[1]):
        raise ShapeError(f"prior must be {(len(x), x.shape[1], y.shape[1])}, got {tuple(prior.shape)}")
    if not (epsilon > 0.0 and 0.0 < mass <= 1.0 and iterations >= 1) or metric not in METRICS:
        raise ConfigError(
            f"transport needs epsilon > 0, mass in 0 to 1, iterations >= 1 and a metric of {', '.join(METRICS)}, got "
            f"{epsilon}, {mass}, {iterations}, {metric!r}"
        )
    return _masses(x[:, :, 0], a, "a"), _masses(y[:, :, 0], b, "b")


def _masses(points: Tensor, given: Tensor | None, name: str) -> Tensor:
    """(Q, N) given masses, or even ones in float32 or wider."""
    if given is None:
        wide = torch.promote_types(points.dtype, torch.float32)
        return torch.full(points.shape, 1.0 / points.shape[1], dtype=wide, device=points.device)
    if given.shape != points.shape:
        raise ShapeError(f"{name} must be {tuple(points.shape)}, got {tuple(given.shape)}")
    return given.detach()
