"""Triton kernels of the MMD: tiles of the kernel matrix are summed where they are made, never written as a whole."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wearfleet_cloud.kernels.operation import operation

__all__ = ["mmd_triton"]


@triton.jit
def _tile(z, shares, i, j, N, B, F, inner, outer, BLOCK: tl.constexpr, BLOCK_F: tl.constexpr):
    """Squared distances and coefficients (BLOCK, BLOCK) of rows ``i`` and columns ``j`` of one problem."""
    squares_i, squares_j = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, F, BLOCK_F):
        column = begin + tl.arange(0, BLOCK_F)[None, :]
        at_i = z + i[:, None].to(tl.int64) * F + column
        at_j = z + j[:, None].to(tl.int64) * F + column
        zi = tl.load(at_i, mask=(i < N)[:, None] & (column < F), other=0.0)
        zj = tl.load(at_j, mask=(j < N)[:, None] & (column < F), other=0.0)
        squares_i += tl.sum(zi * zi, 1)
        squares_j += tl.sum(zj * zj, 1)
        products = tl.dot(zi, tl.trans(zj), products, input_precision="ieee")
    distances = squares_i[:, None] + squares_j[None, :] - 2.0 * products
    distances = tl.where(i[:, None] == j[None, :], 0.0, tl.maximum(distances, 0.0))
    share = (
        tl.load(shares + i, mask=i < N, other=0.0)[:, None]
        * tl.load(shares + j, mask=j < N, other=0.0)[None, :]
    )
    return distances, share * tl.where((i // B)[:, None] == (j // B)[None, :], inner, outer)


@triton.jit
def _forward(
    z,  # (P, N, F)
    shares,  # (P, N)
    gammas,  # (P, G)
    sums,  # (P, T, T) out: zero below the diagonal
    N,
    B,
    F,
    inner,
    outer,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem, row, column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = 0.0
    if column >= row:
        i, j = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
        start = z + problem.to(tl.int64) * N * F
        distances, coefficients = _tile(
            start, shares + problem * N, i, j, N, B, F, inner, outer, BLOCK, BLOCK_F
        )
        values = tl.zeros((BLOCK, BLOCK), tl.float32)
        for number in tl.static_range(G):
            values += tl.exp(-tl.load(gammas + problem * G + number) * distances)
        total = tl.sum(coefficients * values) * tl.where(column > row, 2.0, 1.0)
    tiles = tl.num_programs(1)
    tl.store(sums + (problem * tiles + row) * tiles + column, total)


@triton.jit
def _slopes(
    z,  # (P, N, F)
    shares,  # (P, N)
    gammas,  # (P, G)
    upstream,  # (P,)
    slab,  # (P, R, N) out: derivatives by the squared distances of rows first ... first + R
    first,
    R,
    N,
    B,
    F,
    inner,
    outer,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    problem = tl.program_id(0)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i, j = first + row, tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    start = z + problem.to(tl.int64) * N * F
    distances, coefficients = _tile(start, shares + problem * N, i, j, N, B, F, inner, outer, BLOCK, BLOCK_F)
    values = tl.zeros((BLOCK, BLOCK), tl.float32)
    for number in tl.static_range(G):
        gamma = tl.load(gammas + problem * G + number)
        values -= gamma * tl.exp(-gamma * distances)
    values *= coefficients * tl.load(upstream + problem)
    offsets = (problem * R + row[:, None]).to(tl.int64) * N + j[None, :]
    tl.store(slab + offsets, values, mask=(row < R)[:, None] & (j < N)[None, :])


def _blocks(windows: int) -> dict[str, int]:
    """Small tiles where there are few windows, so that more programs share the work."""
    if windows <= 256:
        return {"BLOCK": 16, "BLOCK_F": 64, "num_warps": 2}
    return {"BLOCK": 32 if windows <= 2048 else 64, "BLOCK_F": 32, "num_warps": 4 if windows <= 2048 else 8}


def _signs(domains: int) -> tuple[float, float]:
    """What a pair of windows counts, beside their shares: of one domain, of two."""
    return 2.0 / domains, -2.0 / (domains * (domains - 1))


def _launch_forward(domains: object, features: Tensor, shares: Tensor, gammas: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(domains, int)
    problems, windows, width = features.shape
    present = shares[..., None] > 0  # padding may hold anything
    z = torch.where(present, features.float(), 0.0)
    z = torch.where(
        present, z - z.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1), 0.0
    )
    blocks = _blocks(windows)
    tiles = triton.cdiv(windows, blocks["BLOCK"])
    sums = z.new_empty((problems, tiles, tiles))
    _forward[problems, tiles, tiles](
        z.contiguous(), shares.contiguous(), gammas.contiguous(), sums, windows, windows // domains, width,
        *_signs(domains), G=gammas.shape[-1], **blocks,
    )  # fmt: skip
    return sums.double().sum(dim=(1, 2)).float(), z


def _launch_backward(
    domains: object,
    _needs: tuple[bool, ...],
    features: Tensor,
    shares: Tensor,
    gammas: Tensor,
    z: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, ...]:
    """4 (diag(W 1) Z - W Z), W in slabs of at most F rows: no more memory than the features take."""
    assert isinstance(domains, int)
    problems, windows, width = features.shape
    blocks = _blocks(windows)
    rows = min(windows, triton.cdiv(max(width, 64), blocks["BLOCK"]) * blocks["BLOCK"])
    slab = z.new_empty((problems, rows, windows))
    found = features.new_empty(features.shape)
    for first in range(0, windows, rows):
        count = min(rows, windows - first)
        part = slab.flatten()[: problems * count * windows].view(problems, count, windows)
        _slopes[problems, triton.cdiv(count, blocks["BLOCK"]), triton.cdiv(windows, blocks["BLOCK"])](
            z, shares.contiguous(), gammas.contiguous(), gradient.contiguous(), part, first, count, windows,
            windows // domains, width, *_signs(domains), G=gammas.shape[-1], **blocks,
        )  # fmt: skip
        own = z[:, first : first + count]
        found[:, first : first + count] = 4.0 * (part.sum(dim=2, keepdim=True) * own - part @ z)
    return (found,)


_mmd = operation(_launch_forward, _launch_backward, values=1, differentiable=1)


def mmd_triton(features: Tensor, gammas: Tensor, weight: Tensor | None = None) -> Tensor:
    """As ``mmd_reference``; the result is float32."""
    domains, windows, width = features.shape
    if weight is None:
        shares = torch.full((domains, windows), 1.0 / windows, dtype=torch.float32, device=features.device)
    else:
        shares = weight.float() / weight.float().sum(dim=1, keepdim=True).clamp(min=1e-12)
    flat = features.reshape(1, domains * windows, width)
    return _mmd(domains, flat, shares.reshape(1, -1), gammas.float().reshape(1, -1))[0][0]
