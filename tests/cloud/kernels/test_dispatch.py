"""Who computes: Triton for float32 and bfloat16 on CUDA, PyTorch for everything else, with one result."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import kernel_calls
import pytest
import torch
import wearfleet_cloud.kernels
from kernel_calls import CALLS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from wearfleet_cloud.kernels import dispatch
from wearfleet_cloud.kernels.dispatch import takes_triton

KERNELS = Path(wearfleet_cloud.kernels.__file__).parent
EVERY = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
PYTORCH = ("_reference", "_direct", "_closed", "_gram", "_spread", "potentials")
# The float32 results differ from the float64 ones by rounding alone; how much an operation may lose is in its own test.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def result_and_gradients(call, leaves):
    """A call's result and, if it has them, the gradients of a sum in which no number has the factor of another."""
    if not call.differentiable:
        return [call.function(*leaves)]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    result = call.function(*leaves)
    factors = 1.0 + torch.arange(result.numel(), device=result.device).reshape(result.shape) / 7
    return [result.detach(), *torch.autograd.grad((result * factors).sum(), leaves)]


def assert_all_close(call, found, exact):
    """A gradient in bfloat16 is a sum of up to four parts, each rounded: 4 x 2^-8 of the largest number."""
    for ours, theirs in zip(found, exact, strict=True):
        rounded = 4 * 2.0**-8 * theirs.abs().max().item() if ours.dtype == torch.bfloat16 else 0.0
        excess = call.rounding if found[-1].dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(
            ours.double().cpu(), theirs, rtol=CLOSE["rtol"], atol=CLOSE["atol"] + rounded + excess
        )


def only_kernels(call, monkeypatch):
    """Dispatch says yes to all tensors, and nothing else is there to compute."""
    operation = importlib.import_module(f"wearfleet_cloud.kernels.{call.package}")
    monkeypatch.setattr(operation, "takes_triton", lambda *_: True)
    for name in vars(operation).copy():
        if name.endswith(PYTORCH):
            monkeypatch.setattr(operation, name, None)


def test_every_operation_is_called_here():
    assert {call.package for call in CALLS} == {path.parent.name for path in KERNELS.glob("*/kernel.py")}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_processor_computes_in_float32_or_wider(call, dtype):
    found = result_and_gradients(call, call.leaves(dtype))
    exact = result_and_gradients(call, call.leaves(torch.float64))
    assert exact[0].dtype == torch.float64
    assert found[0].dtype in (torch.float32, torch.float64)
    assert_all_close(call, found, exact)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_computes_the_same(call, dtype, device, monkeypatch):
    """The public function with kernels only; on a CPU a rule that says yes to all sends it to the interpreter."""
    exact = result_and_gradients(call, call.leaves(torch.float64))
    only_kernels(call, monkeypatch)
    assert_all_close(
        call, result_and_gradients(call, [leaf.to(device) for leaf in call.leaves(dtype)]), exact
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", [call for call in CALLS if call.package != "robust"], ids=lambda call: call.name
)
@pytest.mark.parametrize("triton", [False, True])
def test_stacked_calls_are_single_calls(call, triton, device, monkeypatch):
    """The library's stacked products may add in another order, hence float64 where it computes."""
    if triton:
        only_kernels(call, monkeypatch)
    dtype, place = (torch.float32, device) if triton else (torch.float64, "cpu")
    runs = [[leaf.to(place) for leaf in call.leaves(dtype, seed)] for seed in range(3)]
    function = call.function
    if call.differentiable:
        everything = tuple(range(len(call.shapes)))
        function = grad(lambda *leaves: call.function(*leaves).sum(), everything)
    found = vmap(function)(*(torch.stack(parts) for parts in zip(*runs, strict=True)))
    for number, leaves in enumerate(runs):
        ours, theirs = (values if call.differentiable else (values,) for values in (found, function(*leaves)))
        for stacked, single in zip(ours, theirs, strict=True):
            torch.testing.assert_close(stacked[number], single, **(CLOSE if triton else EXACT))


def test_the_rule_of_dispatch(monkeypatch):
    """Tensors that only say that they are on CUDA suffice to ask."""
    with FakeTensorMode():
        wide, narrow, double, half, labels = (
            torch.empty(2, device="cuda:0", dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64)
        )
        elsewhere = torch.empty(2)
    assert takes_triton(wide)
    assert takes_triton(wide, narrow, labels)
    for other in (double, half, elsewhere):
        assert not takes_triton(other)
        assert not takes_triton(wide, other)
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    dispatch._has_triton.cache_clear()
    try:
        assert not takes_triton(wide)
    finally:
        dispatch._has_triton.cache_clear()


@pytest.mark.slow
def test_without_triton_everything_imports_and_a_processor_computes(tmp_path):
    """In a process of its own, in which triton cannot be imported."""
    program = (
        "import sys; sys.modules['triton'] = None; import torch; from kernel_calls import CALLS; "
        "torch.save([call.function(*call.leaves(torch.float32)) for call in CALLS], sys.argv[1])"
    )
    path = os.pathsep.join([str(Path(kernel_calls.__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", program, tmp_path / "results.pt"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for call, found in zip(CALLS, torch.load(tmp_path / "results.pt"), strict=True):
        torch.testing.assert_close(found, call.function(*call.leaves(torch.float32)))
