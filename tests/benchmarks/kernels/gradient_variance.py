"""Fishr's penalty of a linear classifier; its product with the features is part of everybody's time."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from operation_cases import Case
from torch.func import grad, vmap
from wearfleet_cloud.kernels.gradient_variance import fishr_penalty, gradient_variance


def sizes(*shapes):
    return {
        f"{d}x{b}x{f}x{k}": {"domains": d, "windows": b, "features": f, "classes": k} for d, b, f, k in shapes
    }


def make(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    features = torch.randn(shape["domains"], shape["windows"], shape["features"], **options)
    weights = torch.randn(shape["classes"], shape["features"], **options) / shape["features"] ** 0.5
    labels = torch.randint(0, shape["classes"], features.shape[:2], **options)
    return (features.to(dtype), weights.to(dtype), torch.zeros_like(weights[:, 0]).to(dtype)), (labels,)


def ours(features, weights, bias, labels):
    return fishr_penalty(gradient_variance(features, features @ weights.T + bias, labels))


def eager(features, weights, bias, labels):
    """Gradients of every window written out, as an outer product."""
    residual = torch.softmax(features @ weights.T + bias, -1) - F.one_hot(labels, len(bias))
    inputs = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    variance = (residual[..., :, None] * inputs[..., None, :]).var(1, correction=0)
    return (variance - variance.mean(0)).square().mean()


def naive(features, weights, bias, labels):
    """Gradients of every window by autograd, differentiated once more."""

    def loss(w, b, window, label):
        return F.cross_entropy(window @ w.T + b, label)

    by_weights, by_bias = vmap(vmap(grad(loss, (0, 1)), (None, None, 0, 0)), (None, None, 0, 0))(
        weights, bias, features, labels
    )
    variance = torch.cat([by_weights, by_bias[..., None]], -1).var(1, correction=0)
    return (variance - variance.mean(0)).square().mean()


def counted_bytes(shape, element):
    windows, kf = shape["domains"] * shape["windows"], shape["domains"] * shape["classes"] * shape["features"]
    rows = windows * shape["features"] * element
    return {"forward": rows + windows * shape["classes"] * element + 8 * kf, "backward": 2 * rows + 8 * kf}


def counted_operations(shape):
    product = float(shape["domains"] * shape["windows"] * shape["features"] * shape["classes"])
    return {"forward": 6 * product, "backward": 12 * product}


CASES = [
    Case(
        "gradient_variance",
        sizes((3, 32, 832, 6), (4, 32, 800, 19), (20, 25, 256, 12), (4, 128, 1472, 12)),
        sizes((4, 1024, 1024, 20), (8, 2048, 2048, 20)),
        make,
        ours,
        eager,
        counted_bytes,
        counted_operations,
        "arithmetic",  # products are float32 without tensor cores
        naive=naive,
        memory_limit=lambda s: 24.0 * s["domains"] * s["windows"] * s["features"] * s["classes"],
    )
]
