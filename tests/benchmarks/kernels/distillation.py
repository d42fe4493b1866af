"""Distillation with labels, three divergences; the teacher is not trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from operation_cases import Case
from wearfleet_cloud.kernels.distillation import DIVERGENCES, distillation

TAU, ALPHA, BETA = 2.0, 0.5, 0.5
WEARABLE = {f"{n}x{k}": {"windows": n, "classes": k} for n, k in ((96, 6), (128, 19), (256, 2), (512, 12))}
LARGE = {f"{n}x{k}": {"windows": n, "classes": k} for n, k in ((16_384, 20), (16_384, 256), (16_384, 2048))}


def make(sizes, dtype, generator):
    options = {"generator": generator, "device": generator.device}
    student, teacher = (3 * torch.randn(2, sizes["windows"], sizes["classes"], **options)).to(dtype)
    return (student,), (teacher, torch.randint(0, sizes["classes"], (sizes["windows"],), **options))


def ours(divergence):
    def function(student, teacher, labels):
        return distillation(
            student, teacher, labels, divergence=divergence, temperature=TAU, alpha=ALPHA, beta=BETA
        )

    return function


def eager(divergence):
    def function(student, teacher, labels):
        p, q = F.log_softmax(teacher / TAU, -1), F.log_softmax(student / TAU, -1)
        if divergence == "forward":
            soft = F.kl_div(q, p, log_target=True, reduction="batchmean")
        elif divergence == "reverse":
            soft = F.kl_div(p, q, log_target=True, reduction="batchmean")
        else:
            m = torch.log(BETA * p.exp() + (1 - BETA) * q.exp())
            soft = BETA * F.kl_div(m, p, log_target=True, reduction="batchmean")
            soft = soft + (1 - BETA) * F.kl_div(m, q, log_target=True, reduction="batchmean")
        return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * TAU**2 * soft

    return function


def counted_bytes(sizes, element):
    rows, row = sizes["windows"], sizes["classes"] * element
    return {"forward": rows * (2 * row + 12), "backward": rows * (3 * row + 12)}


def counted_operations(sizes):
    values = float(sizes["windows"] * sizes["classes"])
    return {"forward": 20 * values, "backward": 25 * values}


CASES = [
    Case(
        f"distillation/{name}",
        WEARABLE,
        LARGE,
        make,
        ours(name),
        eager(name),
        counted_bytes,
        counted_operations,
        "memory",
    )
    for name in DIVERGENCES
]
