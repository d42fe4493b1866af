"""Aggregation of client updates; nothing has a gradient."""

from __future__ import annotations

import torch
from operation_cases import Case
from wearfleet_cloud.kernels import robust

MOST_SORTED = 64  # updates that go through a network of comparisons, as README.md says


def sizes(*shapes):
    return {f"{k}x{p}": {"updates": k, "size": p} for k, p in shapes}


SMALL = sizes((8, 99_466), (32, 99_466), (100, 99_466))
MANY = sizes((100, 1_000_000), (1000, 99_466), (4096, 25_000))
LARGE = sizes((8, 10_000_000), (32, 3_000_000)) | MANY


def make(shape, dtype, generator):
    updates = torch.randn(shape["updates"], shape["size"], generator=generator, device=generator.device)
    return (updates.to(dtype),), ()


def mean(updates):
    return robust.weighted_mean(updates, torch.ones(len(updates), device=updates.device))


def eager_mean(updates):
    return updates.mean(0)


def clipped(updates):
    weights = torch.ones(len(updates), device=updates.device)
    return robust.weighted_mean(updates, weights, factors=robust.clip_factors(updates, 1.0))


def eager_clipped(updates):
    norms = torch.linalg.vector_norm(updates, dim=1, keepdim=True)
    return (updates * (1.0 / norms).clamp(max=1.0)).mean(0)


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
    """On differences too; it knows float32 and float64 alone."""
    exact = updates if updates.dtype == torch.float64 else updates.float()
    return torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square()


def passes(number):
    """Bytes of so many passes over the updates, and of the result."""

    def counted(shape, element):
        forward = number * shape["updates"] * shape["size"] * element + 4 * shape["size"]
        return {"forward": float(forward), "backward": 0.0}

    return counted


def per_number(count):
    return lambda shape: {"forward": float(count * shape["updates"] * shape["size"]), "backward": 0.0}


def ordering(thresholds):
    """Least and largest of every comparison of the network, or a comparison and a sum for each of 32 bits."""

    def counted(shape):
        width = max(1, (shape["updates"] - 1).bit_length())
        many = shape["updates"] > MOST_SORTED
        each = 64.0 * thresholds if many else 0.5 * (width**2 - width + 4) - 2.0 / shape["updates"]
        return per_number(each)(shape)

    return counted


def pairs(shape):
    return {"forward": 1.5 * shape["updates"] ** 2 * shape["size"], "backward": 0.0}


CASES = [
    Case(f"robust/{name}", SMALL, large, make, ours, eager, counted, operations, bound, no_backward=True)
    for name, ours, eager, large, counted, operations, bound in (
        ("mean", mean, eager_mean, LARGE, passes(1), per_number(2), "memory"),
        ("clipped_mean", clipped, eager_clipped, LARGE, passes(2), per_number(4), "memory"),
        ("median", robust.coordinate_median, eager_median, LARGE, passes(1), ordering(1), "memory"),
        ("trimmed_mean", trimmed, eager_trimmed, LARGE, passes(1), ordering(2), "memory"),
        ("distances", distances, eager_distances, MANY, passes(1), pairs, "arithmetic"),
    )
]
