"""Batched entropic transport, full and partial, loss and gradients; and group-lasso plans."""

from __future__ import annotations

import math

import torch
from operation_cases import Case
from wearfleet_cloud.kernels.sinkhorn import group_lasso_plan, group_lasso_reference, transport_loss

EPSILON, ITERATIONS, MASS = 0.1, 20, 0.6


def sizes(*shapes):
    return {f"{q}x{n}x{m}x{f}": {"problems": q, "n": n, "m": m, "features": f} for q, n, m, f in shapes}


def make(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    x = torch.randn(shape["problems"], shape["n"], shape["features"], **options)
    y = torch.randn(shape["problems"], shape["m"], shape["features"], **options) + 0.3
    return (x.to(dtype), y.to(dtype)), ()


def ours(mass):
    def function(x, y):
        return transport_loss(x, y, epsilon=EPSILON, mass=mass, iterations=ITERATIONS).sum()

    return function


def eager(mass):
    def function(x, y):
        """Costs by one batched product; the partial problem with its dummy points as entries of the matrix."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide), y.to(wide)
        cost = (x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None] - 2 * x @ y.mT).clamp(min=0)
        cost = cost / cost.detach().mean((1, 2), keepdim=True)
        with torch.no_grad():
            c = cost / EPSILON
            log_a, log_b = (
                torch.full_like(c[:, :, 0], -math.log(c.shape[1])),
                torch.full_like(c[:, 0], -math.log(c.shape[2])),
            )
            if mass < 1:
                c = torch.nn.functional.pad(c, (0, 1, 0, 1))
                c[:, -1, -1] = 1e6
                rest = torch.full_like(log_a[:, :1], math.log(1 - mass))
                log_a, log_b = torch.cat([log_a, rest], 1), torch.cat([log_b, rest], 1)
            v = torch.zeros_like(log_b)
            for _ in range(ITERATIONS):
                u = log_a - torch.logsumexp(v[:, None] - c, 2)
                v = log_b - torch.logsumexp(u[:, :, None] - c, 1)
            plan = torch.exp(u[:, :, None] + v[:, None] - c)[:, : cost.shape[1], : cost.shape[2]]
        return (plan * cost).sum()

    return function


def make_lasso(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    cost = torch.rand(shape["problems"], shape["n"], shape["m"], **options).to(dtype)
    groups = torch.arange(shape["n"], device=generator.device).remainder(6).expand(len(cost), -1)
    half = torch.full((len(cost),), 0.5, device=generator.device)
    return (cost,), (groups, half, 0.2 * half)


def lasso(cost, groups, epsilon, eta):
    return group_lasso_plan(cost, groups, epsilon=epsilon, eta=eta, outer=5, iterations=20)


def eager_lasso(cost, groups, epsilon, eta):
    wide = cost.to(torch.promote_types(cost.dtype, torch.float32))
    a, b = (torch.full_like(part, 1.0 / part.shape[1]) for part in (wide[:, :, 0], wide[:, 0]))
    return group_lasso_reference(wide, a, b, groups, epsilon.to(wide), eta.to(wide), 5, 20)


def counted_bytes(shape, _element):
    numbers = shape["problems"] * (shape["n"] + shape["m"]) * shape["features"]
    return {"forward": 4.0 * numbers, "backward": 12.0 * numbers}


def counted_operations(shape):
    pairs = float(shape["problems"] * shape["n"] * shape["m"])
    passes = 1 if max(shape["n"], shape["m"]) <= 64 else 2 * ITERATIONS + 2
    forward = pairs * (2 * shape["features"] * passes + 20 * ITERATIONS)
    return {"forward": forward, "backward": pairs * 6 * shape["features"]}


WEARABLE = sizes((16, 32, 32, 64), (256, 32, 32, 64), (96, 16, 60, 128))
LARGE = sizes((4096, 32, 32, 64), (1, 4096, 4096, 256))
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
CASES = [
    *(
        Case(
            f"sinkhorn/{name}", WEARABLE, LARGE, make, ours(mass), eager(mass), counted_bytes,
            counted_operations, "arithmetic", relative=ROUNDING,
            memory_limit=lambda s: 24.0 * s["problems"] * s["n"] * s["m"],
        )
        for name, mass in (("full", 1.0), ("partial", MASS))
    ),
    Case(
        "sinkhorn/group_lasso", sizes((1, 57, 19, 1), (64, 57, 19, 1)), sizes((4096, 57, 19, 1)), make_lasso, lasso,
        eager_lasso, counted_bytes, counted_operations, "arithmetic", relative=ROUNDING, no_backward=True,
    ),
]  # fmt: skip
