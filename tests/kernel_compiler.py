"""Compile Triton kernels for a Hopper GPU on a machine that has none: every stage to machine code, nothing is run.

Run as a program in a process of its own, because Triton decides once for a process whether it interprets:

    python tests/kernel_compiler.py [--first] [OPERATION...]

It calls every operation of ``tests/benchmarks/kernels`` at its benchmark shapes and types (with ``--first`` at one
wearable shape in bfloat16 and one large in float32), forward and backward, and prints one JSON line for each kernel
that was compiled: registers, stack, shared memory. A kernel that does not compile ends the program with Triton's
message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parent / "benchmarks" / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from wearfleet_cloud.kernels import dispatch

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """What the compiler asks a driver for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


class Compiler:
    """Takes the place of launches: compiles what they would run and keeps what it needs of the machine."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._run = JITFunction.run

    def install(self) -> None:
        """From here on no kernel of this process is launched."""
        compiler = self

        def run(function: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
            del warmup
            kernel = compiler._run(function, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in compiler.found:
                compiler.found[kernel.hash] = {"kernel": function.__name__, **resources(kernel)}
            return kernel

        triton.runtime.driver.set_active(Driver())
        JITFunction.run = run


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(
        entry.split(":", 1) for entry in text.split() if ":" in entry and entry.split(":", 1)[1].isdigit()
    )
    return {
        "warps": kernel.metadata.num_warps,
        "registers": int(fields["REG"]),
        "stack": int(fields["STACK"]),
        "local": int(fields["LOCAL"]),
        "shared": max(int(fields["SHARED"]), kernel.metadata.shared),
    }


def main() -> None:
    """As the first lines of this file say."""
    compiler = Compiler()
    compiler.install()
    dispatch.takes_triton = lambda *_: True
    from bench_kernels import find_cases  # imports the operations, which import the rule of dispatch

    for case in find_cases([word for word in sys.argv[1:] if word != "--first"]):
        for shapes, first in ((case.wearable, torch.bfloat16), (case.large, torch.float32)):
            for sizes in list(shapes.values())[: 1 if "--first" in sys.argv else None]:
                for dtype in (first,) if "--first" in sys.argv else (torch.float32, torch.bfloat16):
                    compile_case(compiler, case, sizes, dtype)


def compile_case(compiler: Compiler, case: Any, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Call an operation once, forward and backward, and print what was compiled for it."""
    before = set(compiler.found)
    leaves, others = case.make(sizes, dtype, torch.Generator().manual_seed(0))
    leaves = tuple(leaf.detach().requires_grad_(not case.no_backward) for leaf in leaves)
    value = case.ours(*leaves, *others).sum()
    if not case.no_backward:
        torch.autograd.grad(value, leaves)
    for key in compiler.found.keys() - before:
        facts = {"operation": case.name, "sizes": dict(sizes), "dtype": str(dtype), **compiler.found[key]}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
