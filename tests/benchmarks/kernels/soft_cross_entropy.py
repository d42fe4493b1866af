"""Mixup's and label-smoothed cross-entropy of every domain."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from operation_cases import Case
from wearfleet_cloud.kernels.soft_cross_entropy import soft_cross_entropy

WEARABLE = {
    f"{d}x{b}x{k}": {"domains": d, "windows": b, "classes": k}
    for d, b, k in ((3, 32, 6), (4, 32, 19), (20, 25, 12), (4, 128, 2))
}
LARGE = {
    f"{d}x{b}x{k}": {"domains": d, "windows": b, "classes": k}
    for d, b, k in ((4, 4096, 20), (16, 1024, 256), (4, 4096, 2048))
}


def make(sizes, dtype, generator):
    shape = (sizes["domains"], sizes["windows"])
    options = {"generator": generator, "device": generator.device}
    logits = torch.randn(*shape, sizes["classes"], **options).to(dtype)
    first, second = torch.randint(0, sizes["classes"], (2, *shape), **options)
    return (logits,), (first, second, torch.rand(shape[0], **options))


def ours(logits, first, second, share):
    return soft_cross_entropy(logits, first, other=second, share=share).mean()


def eager(logits, first, second, share):
    flat = logits.flatten(0, 1)
    losses = [
        F.cross_entropy(flat, y.flatten(), reduction="none").reshape(y.shape).mean(1) for y in (first, second)
    ]
    return (share * losses[0] + (1 - share) * losses[1]).mean()


def smooth(logits, first, *_):
    return soft_cross_entropy(logits, first, smoothing=0.1).mean()


def eager_smooth(logits, first, *_):
    return F.cross_entropy(logits.flatten(0, 1), first.flatten(), label_smoothing=0.1)


def counted_bytes(sizes, element):
    rows = sizes["domains"] * sizes["windows"]
    return {
        "forward": rows * (sizes["classes"] * element + 24),
        "backward": rows * (2 * sizes["classes"] * element + 28),
    }


def counted_operations(sizes):
    values = sizes["domains"] * sizes["windows"] * sizes["classes"]
    return {"forward": 5.0 * values, "backward": 5.0 * values}


CASES = [
    Case(
        f"soft_cross_entropy/{name}",
        WEARABLE,
        LARGE,
        make,
        function,
        other,
        counted_bytes,
        counted_operations,
        "memory",
    )
    for name, function, other in (("mixup", ours, eager), ("smoothed", smooth, eager_smooth))
]
