"""What the losses over all pairs take beside their inputs grows with the features, not with the pairs.

Tensors of the ``meta`` device have sizes and no contents, and launches are left out: what is counted is what the
wrappers of the kernels allocate, at sizes whose matrices would not fit here.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wearfleet_cloud.kernels.contrastive import kernel as contrastive
from wearfleet_cloud.kernels.coral import kernel as coral
from wearfleet_cloud.kernels.mmd import kernel as mmd
from wearfleet_cloud.kernels.sinkhorn import kernel as sinkhorn

WIDTH = 256


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that live at once, at their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key, size):
        self._alive.discard(key)
        self.now -= size


class NoLaunch:
    """In place of a kernel."""

    def __getitem__(self, _grid):
        return lambda *_args, **_kwargs: None


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """In place of the poison of the other tests, which would write to memory: no kernel runs."""
    for module in (contrastive, coral, mmd, sinkhorn):
        for name, value in vars(module).copy().items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                monkeypatch.setattr(module, name, NoLaunch())


def features(*shape):
    return torch.empty(shape, device="meta", requires_grad=True)


def of_mmd(rows):
    z = features(4, rows // 4, WIDTH)
    return (z,), lambda: mmd.mmd_triton(z, torch.ones(5, device="meta"))


def of_coral(rows):
    z = features(4, rows // 4, WIDTH)
    return (z,), lambda: coral.coral_penalty_triton(z, None, gram=True)


def _towers(rows):
    leaves = features(rows, WIDTH), features(rows, WIDTH), features(rows), features(rows)
    return leaves, [torch.empty(rows, dtype=torch.int64, device="meta") for _ in range(2)]


def of_softmax(rows):
    leaves, labels = _towers(rows)
    return leaves, lambda: sum(
        t.sum() for t in contrastive.softmax_statistics_triton(*leaves, *labels, False)[:2]
    )


def of_sigmoid(rows):
    leaves, labels = _towers(rows)
    leaves = (*leaves, features())
    return leaves, lambda: contrastive.sigmoid_losses_triton(*leaves, *labels)


def of_transport(rows):
    x, y = features(1, rows, WIDTH), features(1, rows, WIDTH)
    masses = torch.empty(2, 1, rows, device="meta")
    return (x, y), lambda: sinkhorn.transport_triton(x, y, *masses, None, 0.1, 0.6, 2, "euclidean")[0]


def peak_of(make, rows):
    """Of forward and backward together, in units of one set of features."""
    leaves, call = make(rows)
    with Allocations() as seen:
        torch.autograd.grad(call().sum(), leaves)
    return seen.peak / (4 * rows * WIDTH)


@pytest.mark.parametrize("make", [of_mmd, of_coral, of_softmax, of_sigmoid, of_transport])
def test_memory_grows_with_the_rows_and_not_with_their_square(make):
    """Counted in sets of features it is a constant: slabs of 2 F rows are two sets, the rest copies and gradients."""
    few, many = peak_of(make, 8192), peak_of(make, 32_768)
    assert few < 11
    assert many < few + 0.05


def test_a_matrix_of_all_pairs_would_be_seen():
    def spoilt(rows):
        leaves, call = of_mmd(rows)
        return leaves, lambda: call() + torch.empty(rows, rows, device="meta").sum()

    assert peak_of(spoilt, 32_768) > 32_768 / WIDTH


def test_what_lives_at_once_is_added_and_what_died_is_not():
    with Allocations() as seen:
        first = torch.empty(1000, device="meta")
        second = first + 1
        view = second.view(10, 100)
        del first, second
        third = torch.empty(500, device="meta")
    assert (seen.now, seen.peak) == (view.nbytes + third.nbytes, 8000)
