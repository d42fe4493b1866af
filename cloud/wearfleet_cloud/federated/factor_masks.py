"""A client's own rank on the device: a mask over columns of the factors B and rows of A.

With h (R,), 1 for the first r numbers and 0 beyond: what B A x adds is B diag(h) A x, columns of B beyond r are 0 after
every step, and rows of A beyond r stay as they came. The device lowers r by its settings; a plan says nothing of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec

from wearfleet_cloud.federated.client_program import ClientProgram
from wearfleet_cloud.federated.client_steps import Tensors
from wearfleet_cloud.federated.plan_compiler import Step

__all__ = ["HELD", "within_rank"]

HELD: Final = "held_rank"
"""Name of the mask h."""


def within_rank(program: ClientProgram) -> ClientProgram:
    """The program with every phase masked, and the mask among its tensors.

    Args:
        program: over a model with low-rank factors A (R, width) and B (width, R), all of one rank R.
    """
    rows, columns = (
        [spec.name for spec in program.tensors if spec.role == role]
        for role in (TensorRole.LORA_A, TensorRole.LORA_B)
    )
    rank = next(spec.shape[0] for spec in program.tensors if spec.name == rows[0])
    held = TensorSpec(HELD, "float32", (rank,), TensorRole.LORA_RANK, TensorGroup.AUX, "ones")
    steps: dict[int, Step] = {}  # phases that share a step share its graph
    for phase in program.phases:
        steps.setdefault(id(phase.step), _masked(phase.step, rows, columns))
    phases = tuple(replace(phase, step=steps[id(phase.step)]) for phase in program.phases)
    return ClientProgram((*program.tensors, held), phases)


def _masked(step: Step, rows: Sequence[str], columns: Sequence[str]) -> Step:
    """The step with B diag(h) for B; of its results B diag(h), and rows of A that move only where h is 1.

    Gradients need no mask: those of A beyond r are 0 where B is, and those of B reach nothing else.
    """

    def masked(given: Tensors) -> Tensors:
        held = given[HELD]
        results = dict(step({**given, **{name: given[name] * held for name in columns}}))
        for name in columns:
            if name in results:
                results[name] = results[name] * held
        for name in rows:
            if name in results:
                results[name] = torch.where(held[:, None] > 0.5, results[name], given[name])
        return results

    return masked
