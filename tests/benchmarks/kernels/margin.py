"""Large margin of mixed windows, and additive angular margin; the classifier's product is in everybody's time."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from operation_cases import Case
from wearfleet_cloud.kernels.margin import additive_angular, large_margin, large_margin_reference

GAMMA, TOP = 10.0, 5
SCALE, MARGIN = 30.0, 0.5


def sizes(*shapes):
    return {f"{n}x{f}x{k}": {"windows": n, "features": f, "classes": k} for n, f, k in shapes}


def make(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    features = torch.randn(shape["windows"], shape["features"], **options)
    weight = torch.randn(shape["classes"], shape["features"], **options) / shape["features"] ** 0.5
    labels = torch.randint(0, shape["classes"], (shape["windows"], 2), **options)
    return (features.to(dtype), weight.to(dtype)), (labels,)


def ours(features, weight, labels):
    return large_margin(features @ weight.T, weight, labels, gamma=GAMMA, top_k=TOP, floor=1e-3).sum()


def eager(features, weight, labels):
    """Norms from the explicit gradient p_y (w_y - wbar) - p_k (w_k - wbar) of every window and competitor."""
    p = torch.softmax(features @ weight.T, -1)
    fixed, rows = p.detach(), weight.detach()
    centred = rows - (fixed @ rows)[:, None]
    slopes = fixed[..., None] * centred
    total = 0.0
    for label in labels.unbind(1):
        top = min(TOP, p.shape[1] - 1)
        rivals = fixed.scatter(1, label[:, None], -1.0).topk(top, 1).indices
        index = torch.cat([label[:, None], rivals], 1)[..., None].expand(-1, -1, rows.shape[1])
        chosen = slopes.gather(1, index)
        norms = (chosen[:, :1] - chosen[:, 1:]).norm(dim=-1)
        gaps = p.gather(1, label[:, None]) - p.gather(1, rivals)
        total = total - (gaps / (norms + 1e-8).clamp(min=1e-3)).mean(1).clamp(-3 * GAMMA, GAMMA).sum()
    return total


def naive(features, weight, labels):
    """Norms by autograd, one call a label and competitor, as the published code does."""
    top = min(TOP, weight.shape[0] - 1)
    bias = torch.zeros_like(weight[:, 0])
    return large_margin_reference(features, weight, bias, labels, GAMMA, top, "mean", 1e-3).sum()


def angular(features, weight, labels):
    return additive_angular(features, weight, labels[:, 0], scale=SCALE, margin=MARGIN).mean()


def eager_angular(features, weight, labels):
    cosines = F.normalize(features) @ F.normalize(weight).T
    own = cosines.gather(1, labels[:, :1])
    turn = torch.tensor(MARGIN, dtype=own.dtype, device=own.device)
    sine = (1.0 - own**2).clamp(min=1e-12).sqrt()
    moved = torch.where(own > -turn.cos(), own * turn.cos() - sine * turn.sin(), own - MARGIN * turn.sin())
    return F.cross_entropy(SCALE * cosines.scatter(1, labels[:, :1], moved), labels[:, 0])


def counted_bytes(shape, element):
    rows = shape["windows"] * (shape["features"] + shape["classes"]) * element
    return {"forward": rows, "backward": 2 * rows}


def counted_operations(shape):
    product = 2.0 * shape["windows"] * shape["features"] * shape["classes"]
    inner = shape["windows"] * (6.0 * shape["classes"] ** 2 + 100 * shape["classes"])
    return {"forward": product + inner, "backward": 2 * product + inner}


WEARABLE = sizes((96, 64, 6), (128, 800, 19), (256, 256, 2), (512, 256, 12), (128, 1472, 12), (512, 1472, 19))
ROUNDED = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.5,
}  # the logits of a classifier in bfloat16 are good to 2^-8 each
CASES = [
    Case(
        "margin/large", WEARABLE, sizes((16_384, 1024, 20), (16_384, 2048, 20)), make, ours, eager, counted_bytes,
        counted_operations, "memory", naive=naive, relative=ROUNDED,
        memory_limit=lambda s: 12.0 * s["windows"] * s["features"] * s["classes"],
    ),
    Case(
        "margin/additive_angular", WEARABLE, sizes((16_384, 256, 1024), (16_384, 512, 8192)), make, angular,
        eager_angular, counted_bytes, counted_operations, "memory",
        relative={torch.float32: 1e-4, torch.bfloat16: 5e-2},
    ),
]  # fmt: skip
