"""MMD of all pairs of domains with the seven published bandwidths."""

from __future__ import annotations

import torch
from operation_cases import Case
from wearfleet_cloud.kernels.mmd import FIXED_GAMMAS, mmd


def sizes(*shapes):
    return {f"{d}x{b}x{f}": {"domains": d, "windows": b, "features": f} for d, b, f in shapes}


def make(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    features = torch.randn(shape["domains"], shape["windows"], shape["features"], **options)
    features += 0.3 * torch.arange(shape["domains"], device=generator.device)[:, None, None]
    gammas = torch.tensor(FIXED_GAMMAS, device=generator.device) / shape["features"]
    return (features.to(dtype),), (gammas,)


def eager(features, gammas):
    domains, windows, _ = features.shape
    flat = features.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    squares = (flat.square().sum(1)[:, None] + flat.square().sum(1) - 2.0 * flat @ flat.T).clamp(min=1e-30)
    values = torch.exp(-gammas.to(flat.dtype)[:, None, None] * squares).sum(0)
    blocks = values.reshape(domains, windows, domains, windows).mean((1, 3))
    within = blocks.diagonal().sum()
    across = blocks.sum() - within
    return 2.0 / domains * within - 2.0 / (domains * (domains - 1)) * across


def counted_bytes(shape, element):
    numbers = shape["domains"] * shape["windows"] * shape["features"]
    return {"forward": numbers * (element + 12), "backward": numbers * (element + 12)}


def counted_operations(shape):
    pairs = float((shape["domains"] * shape["windows"]) ** 2)
    return {"forward": pairs * (shape["features"] + 7), "backward": pairs * (4 * shape["features"] + 14)}


CASES = [
    Case(
        "mmd",
        sizes((3, 32, 832), (4, 32, 800), (4, 128, 1472), (20, 16, 256)),
        sizes((4, 1024, 1024), (4, 4096, 256), (4, 4096, 2048)),
        make,
        mmd,
        eager,
        counted_bytes,
        counted_operations,
        "arithmetic",
        relative={torch.float32: 1e-3, torch.bfloat16: 5e-2},
        memory_limit=lambda s: 4.0 * 10 * (s["domains"] * s["windows"]) ** 2,
    )
]
