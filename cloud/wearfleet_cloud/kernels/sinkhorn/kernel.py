"""Triton kernels of entropic transport: small problems whole in one program, large ones streamed."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation
from wearfleet_cloud.kernels.sinkhorn.reference import LEAST_DISTANCE, LEAST_MASS, Metric

__all__ = ["MOST_SMALL", "iterate", "log_masses", "transport_triton", "whole"]

MOST_SMALL = 64  # points on each side of a problem that one program holds whole
_SLAB = 256  # rows of a slab at least, work enough for a product


@dataclass(frozen=True, slots=True)
class _Form:
    epsilon: float
    mass: float
    iterations: int
    metric: Metric
    prior: bool


@triton.jit
def _cost(
    x, y, prior, i, j, N, M, F, least, EUCLIDEAN: tl.constexpr, PRIOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Costs (BLOCK_N, BLOCK_M) of rows ``i`` and columns ``j`` of one problem, and the distances alone.

    Points are counted from the first of x: rounding grows with their spread, not with what they have in common.
    """
    squares_i, squares_j = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, F, BLOCK_F):
        column = begin + tl.arange(0, BLOCK_F)[None, :]
        at_i, at_j = x + i[:, None].to(tl.int64) * F + column, y + j[:, None].to(tl.int64) * F + column
        origin = tl.load(x + column, mask=column < F, other=0.0)
        xi = tl.load(at_i, mask=(i < N)[:, None] & (column < F), other=0.0) - origin
        yj = tl.load(at_j, mask=(j < M)[:, None] & (column < F), other=0.0) - origin
        squares_i += tl.sum(xi * xi, 1)
        squares_j += tl.sum(yj * yj, 1)
        products = tl.dot(xi, tl.trans(yj), products, input_precision="ieee")
    away = tl.maximum(squares_i[:, None] + squares_j[None, :] - 2.0 * products, 0.0)
    if EUCLIDEAN:
        away = tl.sqrt(tl.maximum(away, least * least))
    cost = away
    if PRIOR:
        inside = (i < N)[:, None] & (j < M)[None, :]
        cost += tl.load(prior + i[:, None].to(tl.int64) * M + j[None, :], mask=inside, other=0.0)
    return cost, away


@triton.jit
def _lse(values, axis: tl.constexpr):
    """Logarithm of the sum of exponentials along an axis; very negative entries are absent."""
    top = tl.max(values, axis)
    return top + tl.log(tl.sum(tl.exp(values - tl.expand_dims(top, axis)), axis))


@triton.jit
def _join(one, two):
    """log(e^one + e^two)."""
    top = tl.maximum(one, two)
    return top + tl.log(tl.exp(one - top) + tl.exp(two - top))


@triton.jit
def iterate(cost, log_a, log_b, rest, iterations, PARTIAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Potentials of a problem that is held whole; ``cost`` is over epsilon and 1e30 where there are no points."""
    u, v = tl.zeros((BLOCK_N,), tl.float32), tl.where(log_b > -1e29, 0.0, -1e30)
    dummy_v = 0.0
    for _ in range(iterations):
        incoming = _lse(v[None, :] - cost, 1)
        if PARTIAL:
            incoming = _join(incoming, dummy_v)
        u = tl.where(log_a > -1e29, log_a - incoming, -1e30)
        outgoing = _lse(u[:, None] - cost, 0)
        if PARTIAL:
            dummy_u = rest - _lse(v, 0)
            outgoing = _join(outgoing, dummy_u)
            dummy_v = rest - _lse(u, 0)
        v = tl.where(log_b > -1e29, log_b - outgoing, -1e30)
    return u, v


@triton.jit
def log_masses(masses, index, count, least):
    """(BLOCK,) log of masses, at least that of ``least``; of points that are not there -1e30."""
    inside = index < count
    return tl.where(inside, tl.log(tl.maximum(tl.load(masses + index, mask=inside, other=1.0), least)), -1e30)


@triton.jit
def _solve_small(
    x,  # (Q, N, F)
    y,  # (Q, M, F)
    a,  # (Q, N)
    b,  # (Q, M)
    prior,  # (Q, N, M)
    u_out,  # (Q, N) out
    v_out,  # (Q, M) out
    scale,  # (Q,) 1 / (mean cost x epsilon)
    N,
    M,
    F,
    rest,  # logarithm of the mass that stays
    iterations,
    least_mass,
    least,
    EUCLIDEAN: tl.constexpr,
    PRIOR: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    cost, _ = _cost(
        x + problem * N * F, y + problem * M * F, prior + problem * N * M, i, j, N, M, F, least,
        EUCLIDEAN, PRIOR, BLOCK_N, BLOCK_M, BLOCK_F,
    )  # fmt: skip
    inside = (i < N)[:, None] & (j < M)[None, :]
    cost = tl.where(inside, cost * tl.load(scale + problem), 1e30)
    log_a, log_b = (
        log_masses(a + problem * N, i, N, least_mass),
        log_masses(b + problem * M, j, M, least_mass),
    )
    u, v = iterate(cost, log_a, log_b, rest, iterations, PARTIAL, BLOCK_N)
    tl.store(u_out + problem * N + i, u, mask=i < N)
    tl.store(v_out + problem * M + j, v, mask=j < M)


@triton.jit
def _half_step(
    x,  # (Q, N, F) the side that is updated
    y,  # (Q, M, F)
    prior,  # (Q, N, M), or (Q, M, N) with TURNED
    a,  # (Q, N)
    v,  # (Q, M)
    dummy,  # (Q,) potential of the dummy on the other side
    u_out,  # (Q, N) out
    scale,  # (Q,)
    N,
    M,
    F,
    least_mass,
    least,
    EUCLIDEAN: tl.constexpr,
    PRIOR: tl.constexpr,
    TURNED: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale + problem)
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, M, BLOCK):
        j = begin + tl.arange(0, BLOCK)
        cost, _ = _cost(
            x + problem * N * F, y + problem * M * F, prior, i, j, N, M, F, least,
            EUCLIDEAN, False, BLOCK, BLOCK, BLOCK_F,
        )  # fmt: skip
        inside = (i < N)[:, None] & (j < M)[None, :]
        if PRIOR:
            place = (
                j[None, :].to(tl.int64) * N + i[:, None]
                if TURNED
                else i[:, None].to(tl.int64) * M + j[None, :]
            )
            cost += tl.load(prior + problem * N * M + place, mask=inside, other=0.0)
        values = tl.load(v + problem * M + j, mask=j < M, other=-1e30)[None, :] - cost * factor
        values = tl.where(inside, values, -1e30)
        new = tl.maximum(top, tl.max(values, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(values - new[:, None]), 1)
        top = new
    found = top + tl.log(total)
    if PARTIAL:
        found = _join(found, tl.load(dummy + problem))
    tl.store(u_out + problem * N + i, log_masses(a + problem * N, i, N, least_mass) - found, mask=i < N)


@triton.jit
def _rows(
    x,  # (Q, N, F)
    y,  # (Q, M, F)
    prior,  # (Q, N, M)
    u,  # (Q, N)
    v,  # (Q, M)
    scale,  # (Q,) 1 / (mean cost x epsilon)
    out,  # (Q, TILES_N, TILES_M) sums of plan x cost, or of the costs alone
    N,
    M,
    F,
    least,
    COSTS: tl.constexpr,
    EUCLIDEAN: tl.constexpr,
    PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    cost, _ = _cost(
        x + problem * N * F, y + problem * M * F, prior + problem * N * M, i, j, N, M, F, least,
        EUCLIDEAN, PRIOR, BLOCK, BLOCK, BLOCK_F,
    )  # fmt: skip
    if not COSTS:
        exponent = tl.load(u + problem * N + i, mask=i < N, other=-1e30)[:, None]
        exponent += tl.load(v + problem * M + j, mask=j < M, other=-1e30)[None, :]
        cost *= tl.exp(exponent - cost * tl.load(scale + problem))
    inside = (i < N)[:, None] & (j < M)[None, :]
    place = (problem * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out + place, tl.sum(tl.where(inside, cost, 0.0)))


@triton.jit
def _slopes(
    x,  # (Q, N, F)
    y,  # (Q, M, F)
    prior,  # (Q, N, M)
    u,  # (Q, N)
    v,  # (Q, M)
    scale,  # (Q,) 1 / (mean cost x epsilon)
    upstream,  # (Q,) gradient of the loss over the mean cost
    slab,  # (Q, R, M) out: weight of x_i - y_j in the gradient of rows first ... first + R
    first,
    R,
    N,
    M,
    F,
    least,
    EUCLIDEAN: tl.constexpr,
    PRIOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    cost, away = _cost(
        x + problem * N * F, y + problem * M * F, prior + problem * N * M, i, j, N, M, F, least,
        EUCLIDEAN, PRIOR, BLOCK, BLOCK, BLOCK_F,
    )  # fmt: skip
    exponent = tl.load(u + problem * N + i, mask=i < N, other=-1e30)[:, None]
    exponent += tl.load(v + problem * M + j, mask=j < M, other=-1e30)[None, :]
    weight = tl.load(upstream + problem) * tl.exp(exponent - cost * tl.load(scale + problem))
    if EUCLIDEAN:
        weight = tl.where(away > least, weight / away, 0.0)
    if not EUCLIDEAN:
        weight *= 2.0
    offsets = (problem * R + row[:, None]) * M + j[None, :]
    tl.store(slab + offsets, weight, mask=(row < R)[:, None] & (j < M)[None, :])


def _blocks(n: int, m: int) -> dict[str, int]:
    if max(n, m) <= 512:
        return {"BLOCK": 16, "BLOCK_F": 64, "num_warps": 2}
    return {"BLOCK": 64, "BLOCK_F": 32, "num_warps": 8}


def whole(n: int, m: int) -> dict[str, int]:
    """Blocks and warps of a program that holds a problem whole."""
    sides = [max(16, triton.next_power_of_2(count)) for count in (n, m)]
    return {"BLOCK_N": sides[0], "BLOCK_M": sides[1], "num_warps": 4 if max(sides) <= 32 else 8}


def _options(form: _Form) -> dict[str, bool]:
    return {"EUCLIDEAN": form.metric == "euclidean", "PRIOR": form.prior}


def _launch_forward(
    form: object, x: Tensor, y: Tensor, a: Tensor, b: Tensor, prior: Tensor
) -> tuple[Tensor, ...]:
    assert isinstance(form, _Form)
    x, y, prior = x.float().contiguous(), y.float().contiguous(), prior.contiguous()
    n, m = x.shape[1], y.shape[1]
    mean = (_sums(form, x, y, prior, None) / (n * m)).clamp(min=1e-12)
    scale = (1.0 / (mean * form.epsilon)).contiguous()
    u, v = _potentials(form, x, y, a.contiguous(), b.contiguous(), prior, scale)
    return _sums(form, x, y, prior, (u, v, scale)) / mean, u, v, mean


def _sums(
    form: _Form, x: Tensor, y: Tensor, prior: Tensor, solution: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """(Q,) sums of the costs, each times the plan where there is a solution."""
    problems, n, width = x.shape
    m, blocks = y.shape[1], _blocks(x.shape[1], y.shape[1])
    tiles = [triton.cdiv(count, blocks["BLOCK"]) for count in (n, m)]
    out = x.new_empty((problems, *tiles))
    given = solution or (x, x, x)
    _rows[problems, tiles[0], tiles[1]](
        x,
        y,
        prior,
        *given,
        out,
        n,
        m,
        width,
        LEAST_DISTANCE,
        COSTS=solution is None,
        **_options(form),
        **blocks,
    )
    return out.double().sum(dim=(1, 2)).float()


def _potentials(
    form: _Form, x: Tensor, y: Tensor, a: Tensor, b: Tensor, prior: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    problems, n, width = x.shape
    m = y.shape[1]
    partial = form.mass < 1.0
    rest = float(torch.tensor(1.0 - form.mass).log()) if partial else 0.0
    u, v = x.new_empty((problems, n)), x.new_zeros((problems, m))
    if max(n, m) <= MOST_SMALL:
        _solve_small[problems,](
            x, y, a, b, prior, u, v, scale, n, m, width, rest, form.iterations, LEAST_MASS, LEAST_DISTANCE,
            **_options(form), PARTIAL=partial, BLOCK_F=32, **whole(n, m),
        )  # fmt: skip
        return u, v
    blocks = _blocks(n, m)
    dummy_u, dummy_v = x.new_zeros((problems,)), x.new_zeros((problems,))
    options = {**_options(form), "PARTIAL": partial, **blocks}
    for _ in range(form.iterations):
        _half_step[problems, triton.cdiv(n, blocks["BLOCK"])](
            x,
            y,
            prior,
            a,
            v,
            dummy_v,
            u,
            scale,
            n,
            m,
            width,
            LEAST_MASS,
            LEAST_DISTANCE,
            TURNED=False,
            **options,
        )
        if partial:
            dummy_u, dummy_v = rest - v.logsumexp(1), rest - u.logsumexp(1)
        _half_step[problems, triton.cdiv(m, blocks["BLOCK"])](
            y,
            x,
            prior,
            b,
            u,
            dummy_u,
            v,
            scale,
            m,
            n,
            width,
            LEAST_MASS,
            LEAST_DISTANCE,
            TURNED=True,
            **options,
        )
    return u, v


def _launch_backward(
    form: object,
    needs: tuple[bool, ...],
    x: Tensor,
    y: Tensor,
    _a: Tensor,
    _b: Tensor,
    prior: Tensor,
    u: Tensor,
    v: Tensor,
    mean: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    assert isinstance(form, _Form)
    origin, prior = x[:, :1].float(), prior.contiguous()
    wide_x, wide_y = (x.float() - origin).contiguous(), (y.float() - origin).contiguous()
    problems, n, width = x.shape
    m, blocks = y.shape[1], _blocks(x.shape[1], y.shape[1])
    scale, upstream = (1.0 / (mean * form.epsilon)).contiguous(), (gradient / mean).contiguous()
    height = min(n, max(_SLAB, 2 * width))
    slab = wide_x.new_empty((problems * height * m,))
    by_x, by_y = wide_x.new_empty(x.shape), torch.zeros_like(wide_y)
    for first in range(0, n, height):
        count = min(height, n - first)
        part = slab[: problems * count * m].view(problems, count, m)
        _slopes[problems, triton.cdiv(count, blocks["BLOCK"]), triton.cdiv(m, blocks["BLOCK"])](
            wide_x, wide_y, prior, u, v, scale, upstream, part, first, count, n, m, width, LEAST_DISTANCE,
            **_options(form), **blocks,
        )  # fmt: skip
        own = wide_x[:, first : first + count]
        by_x[:, first : first + count] = part.sum(2, keepdim=True) * own - part @ wide_y
        by_y += part.sum(1)[..., None] * wide_y - part.transpose(1, 2) @ own
    found = (by_x.to(x.dtype), by_y.to(y.dtype))
    return tuple(tensor for tensor, needed in zip(found, needs, strict=True) if needed)


_transport = operation(_launch_forward, _launch_backward, values=1, differentiable=2, constants=3)


def transport_triton(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    prior: Tensor | None,
    epsilon: float,
    mass: float,
    iterations: int,
    metric: Metric,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``transport_reference``; also the potentials u, v and the mean cost. All float32."""
    form = _Form(epsilon, mass, iterations, metric, prior is not None)
    if prior is None:
        prior = x.new_zeros((len(x), 1, 1), dtype=torch.float32)
    loss, u, v, mean = _transport(form, x, y, a.float(), b.float(), prior.float())
    return loss, u, v, mean
