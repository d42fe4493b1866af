"""The Triton kernel of the group-lasso transport: a small problem whole in one program."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation
from wearfleet_cloud.kernels.sinkhorn.kernel import iterate, log_masses, whole
from wearfleet_cloud.kernels.sinkhorn.reference import LEAST_MASS

__all__ = ["group_lasso_triton"]


@dataclass(frozen=True, slots=True)
class _Steps:
    outer: int
    iterations: int


@triton.jit
def _group_lasso(
    cost,  # (Q, N, M)
    a,  # (Q, N)
    b,  # (Q, M)
    groups,  # (Q, N)
    epsilon,  # (Q,)
    eta,  # (Q,)
    plan_out,  # (Q, N, M) out
    N,
    M,
    outer,
    iterations,
    least_mass,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    inside = (i < N)[:, None] & (j < M)[None, :]
    offsets = problem * N * M + i[:, None] * M + j[None, :]
    base = tl.load(cost + offsets, mask=inside, other=0.0).to(tl.float32)
    cold, weight = 1.0 / tl.load(epsilon + problem), tl.load(eta + problem)
    mine = tl.load(groups + problem * N + i, mask=i < N, other=-1)
    again = tl.load(groups + problem * N + tl.arange(0, BLOCK_N), mask=i < N, other=-2)
    same = (mine[:, None] == again[None, :]).to(tl.float32)
    log_a, log_b = (
        log_masses(a + problem * N, i, N, least_mass),
        log_masses(b + problem * M, j, M, least_mass),
    )
    penalty, plan = 0.0 * base, 0.0 * base
    for _ in range(outer):
        scaled = tl.where(inside, (base + weight * penalty) * cold, 1e30)
        u, v = iterate(scaled, log_a, log_b, 0.0, iterations, False, BLOCK_N)
        plan = tl.where(inside, tl.exp(u[:, None] + v[None, :] - scaled), 0.0)
        penalty = 0.5 / tl.sqrt(tl.dot(same, plan, input_precision="ieee") + 1e-3)
    tl.store(plan_out + offsets, plan, mask=inside)


def _launch_lasso(
    steps: object, cost: Tensor, a: Tensor, b: Tensor, groups: Tensor, epsilon: Tensor, eta: Tensor
) -> tuple[Tensor, ...]:
    assert isinstance(steps, _Steps)
    problems, n, m = cost.shape
    plan = cost.new_empty(cost.shape, dtype=torch.float32)
    _group_lasso[problems,](
        cost.float().contiguous(), a.float().contiguous(), b.float().contiguous(), groups.contiguous(),
        epsilon.float().contiguous(), eta.float().contiguous(), plan, n, m, steps.outer, steps.iterations,
        LEAST_MASS, **whole(n, m),
    )  # fmt: skip
    return (plan,)


def _no_slope(*_: object) -> tuple[Tensor, ...]:
    return ()


_lasso = operation(_launch_lasso, _no_slope, values=0, differentiable=0, constants=1)


def group_lasso_triton(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    groups: Tensor,
    epsilon: Tensor,
    eta: Tensor,
    outer: int,
    iterations: int,
) -> Tensor:
    """As ``group_lasso_reference`` for at most ``MOST_SMALL`` points on each side; float32, no gradient."""
    return _lasso(_Steps(outer, iterations), cost, a, b, groups, epsilon, eta)[0]
