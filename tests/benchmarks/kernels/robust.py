"""Aggregation of client updates; nothing has a gradient."""

from __future__ import annotations

import torch
from operation_cases import Case
from wearfleet_cloud.kernels import robust

SMALL = {f"{k}x{p}": {"updates": k, "size": p} for k, p in ((8, 99_466), (32, 99_466), (100, 99_466))}
LARGE = {
    f"{k}x{p}": {"updates": k, "size": p} for k, p in ((8, 10_000_000), (100, 1_000_000), (1000, 99_466))
}
MANY = {f"{k}x{p}": {"updates": k, "size": p} for k, p in ((100, 1_000_000), (1000, 99_466))}


def make(sizes, dtype, generator):
    updates = torch.randn(sizes["updates"], sizes["size"], generator=generator, device=generator.device)
    return (updates.to(dtype),), ()


def mean(updates):
    return robust.weighted_mean(updates, torch.ones(len(updates), device=updates.device))


def eager_mean(updates):
    return updates.mean(0)


def eager_median(updates):
    ordered = updates.sort(0).values
    return 0.5 * (ordered[(len(updates) - 1) // 2] + ordered[len(updates) // 2])


def trimmed(updates):
    return robust.trimmed_mean(updates, len(updates) // 5)


def eager_trimmed(updates):
    trim = len(updates) // 5
    return updates.sort(0).values[trim : len(updates) - trim].mean(0)


def distances(updates):
    return robust.squared_distances(updates).float()


def eager_distances(updates):
    """Row against all rows: no more memory than one difference of every update."""
    return torch.stack([(updates - row).square().sum(1) for row in updates])


def one_pass(sizes, element):
    return {"forward": sizes["updates"] * sizes["size"] * element + 4 * sizes["size"], "backward": 0.0}


def per_number(operations):
    return lambda sizes: {"forward": float(operations * sizes["updates"] * sizes["size"]), "backward": 0.0}


def pairs(sizes):
    return {"forward": 1.5 * sizes["updates"] ** 2 * sizes["size"], "backward": 0.0}


CASES = [
    Case(f"robust/{name}", SMALL, large, make, ours, eager, one_pass, counted, bound, no_backward=True)
    for name, ours, eager, large, counted, bound in (
        ("mean", mean, eager_mean, LARGE, per_number(2), "memory"),
        ("median", robust.coordinate_median, eager_median, LARGE, per_number(96), "memory"),
        ("trimmed_mean", trimmed, eager_trimmed, LARGE, per_number(200), "memory"),
        ("distances", distances, eager_distances, MANY, pairs, "arithmetic"),
    )
]
