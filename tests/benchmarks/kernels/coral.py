"""CORAL penalty of all pairs of domains."""

from __future__ import annotations

from itertools import combinations

import torch
from operation_cases import Case
from wearfleet_cloud.kernels.coral import coral_penalty


def sizes(*shapes):
    return {f"{d}x{b}x{f}": {"domains": d, "windows": b, "features": f} for d, b, f in shapes}


def make(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    features = torch.randn(shape["domains"], shape["windows"], shape["features"], **options)
    scale = 1.0 + 0.3 * torch.arange(shape["domains"], device=generator.device)
    return ((features * scale[:, None, None]).to(dtype),), ()


def eager(features):
    """Covariances of all domains in one product, then every pair."""
    means = features.mean(1)
    rows = features - means[:, None]
    covariances = rows.transpose(1, 2) @ rows / (features.shape[1] - 1)
    a, b = torch.triu_indices(len(features), len(features), 1, device=features.device)
    return (means[a] - means[b]).square().mean() + (covariances[a] - covariances[b]).square().mean()


def naive(features):
    """Pair by pair, each with its own two covariances, as the published code does."""
    terms = []
    for a, b in combinations(range(len(features)), 2):
        means = [features[d].mean(0) for d in (a, b)]
        rows = [features[d] - mean for d, mean in zip((a, b), means, strict=True)]
        one, two = (r.T @ r / (len(r) - 1) for r in rows)
        terms.append((means[0] - means[1]).square().mean() + (one - two).square().mean())
    return torch.stack(terms).mean()


def counted_bytes(shape, element):
    numbers = shape["domains"] * shape["windows"] * shape["features"]
    return {"forward": numbers * (element + 8), "backward": numbers * (element + 12)}


def counted_operations(shape):
    rows, width = shape["domains"] * shape["windows"], shape["features"]
    if 2 * shape["windows"] < width:  # inner products: one triangle forward
        return {"forward": float(rows**2 * width), "backward": 4.0 * rows**2 * width}
    return {"forward": 2.0 * rows * width**2, "backward": 2.0 * rows * width**2}


CASES = [
    Case(
        "coral",
        sizes((3, 32, 832), (4, 32, 800), (4, 128, 1472), (20, 16, 256), (3, 128, 64)),
        sizes((4, 512, 2048), (4, 4096, 1024), (4, 4096, 2048)),
        make,
        coral_penalty,
        eager,
        counted_bytes,
        counted_operations,
        "arithmetic",
        naive=naive,
        relative={torch.float32: 1e-4, torch.bfloat16: 5e-2},
    )
]
