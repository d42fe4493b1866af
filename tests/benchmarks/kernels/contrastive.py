"""Supervised contrastive loss of one tower; softmax and sigmoid losses of two."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from operation_cases import Case
from wearfleet_cloud.kernels.contrastive import multi_positive, pairwise_sigmoid, supervised_contrastive

TAU, SCALE, BIAS = 0.07, 10.0, -10.0


def sizes(*shapes):
    return {f"{m}x{f}": {"rows": m, "features": f} for m, f in shapes}


def make_one(shape, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    features = torch.randn(shape["rows"], shape["features"], **options).to(dtype)
    return (features,), (torch.randint(0, 12, (shape["rows"],), **options),)


def make_two(shape, dtype, generator):
    (first,), (labels,) = make_one(shape, dtype, generator)
    (second,), _ = make_one(shape, dtype, generator)
    return (first, second), (labels,)


def cosines(first, second):
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


def eager_one(features, labels):
    s = cosines(features, features) / TAU
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~own
    lse = s.masked_fill(own, -torch.inf).logsumexp(1)
    count = positive.sum(1)
    terms = torch.where(count > 0, lse - (s * positive).sum(1) / count.clamp(min=1), 0.0)
    return terms.sum() / (count > 0).sum()


def eager_two(first, second, labels):
    s = cosines(first, second) / TAU
    positive = (labels[:, None] == labels).to(s.dtype)
    count = positive.sum(1)
    forth = (s.logsumexp(1) - (s * positive).sum(1) / count).mean()
    return 0.5 * (forth + (s.logsumexp(0) - (s * positive).sum(0) / count).mean())


def eager_sigmoid(first, second, labels):
    s = SCALE * cosines(first, second) + BIAS
    sign = torch.where(labels[:, None] == labels, 1.0, -1.0).to(s.dtype)
    return F.softplus(-sign * s).sum() / len(labels)


def ours_two(first, second, labels):
    tau = torch.full((), TAU, device=first.device)
    return multi_positive(first, second, labels, labels, temperature=tau)


def ours_sigmoid(first, second, labels):
    scale, bias = (torch.full((), value, device=first.device) for value in (SCALE, BIAS))
    return pairwise_sigmoid(first, second, labels, labels, scale=scale, bias=bias)


def counted(towers, passes):
    def bytes_of(shape, element):
        numbers = towers * shape["rows"] * shape["features"] * element
        return {"forward": numbers, "backward": 2 * numbers}

    def operations(shape):
        product = 2.0 * shape["rows"] ** 2 * shape["features"]
        return {"forward": passes * product, "backward": passes * 3 * product}

    return bytes_of, operations


WEARABLE = sizes((96, 64), (192, 800), (256, 256), (512, 1472))
LARGE = sizes((4096, 512), (16_384, 256), (16_384, 2048))
CASES = [
    Case(
        f"contrastive/{name}", WEARABLE, LARGE, make, ours, eager, *counted(towers, passes), "arithmetic",
        relative={torch.float32: 1e-4, torch.bfloat16: 5e-2},
        memory_limit=lambda s: 40.0 * s["rows"] ** 2,
    )
    for name, make, ours, eager, towers, passes in (
        ("supervised", make_one, supervised_contrastive, eager_one, 1, 1),
        ("two_towers", make_two, ours_two, eager_two, 2, 2),
        ("sigmoid", make_two, ours_sigmoid, eager_sigmoid, 2, 1),
    )
]  # fmt: skip
