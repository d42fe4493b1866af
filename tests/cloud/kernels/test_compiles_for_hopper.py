"""Every kernel compiles to machine code of the GPU it is meant for, on a machine that has none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wearfleet_cloud.kernels

SHARED_OF_A_PROCESSOR = 227 << 10  # bytes that one program may have on Hopper
KERNELS = Path(wearfleet_cloud.kernels.__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_and_fits_the_gpu():
    program = [sys.executable, Path(__file__).parents[2] / "kernel_compiler.py", "--first"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    written = {path.parent.name for path in KERNELS.glob("*/kernel.py")}
    assert {kernel["operation"].partition("/")[0] for kernel in kernels} == written
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_OF_A_PROCESSOR, kernel
        assert kernel["stack"] <= 1024, kernel  # bytes of a thread that registers could not hold
