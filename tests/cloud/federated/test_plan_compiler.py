"""The compiler: same values as torch, same bytes twice, standard operators only, clear refusals."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from oracles.plan_runner import open_graph
from oracles.small_federation import CONTRACT, model
from torch import Tensor
from wearfleet_cloud.federated import STRATEGIES, create_strategy
from wearfleet_cloud.federated.plan_builder import build_plan
from wearfleet_cloud.federated.plan_compiler import OUTPUT_PREFIX, Step, compile_graph, operators_of
from wearfleet_models import randomness
from wearfleet_protos.errors import ConfigError
from wearfleet_protos.plan import Plan

A = torch.linspace(-2, 2, 24).reshape(2, 3, 4)
POSITIVE = A * A + 0.5

STEPS: dict[str, Step] = {
    "arithmetic": lambda t: {"r": (t["a"] * 2 - t["b"] / 3 + 1) / t["b"] - -t["a"]},
    "powers": lambda t: {"r": t["b"] ** 2 + t["b"] ** -0.5 + torch.sqrt(t["b"]) + torch.rsqrt(t["b"])},
    "functions": lambda t: {
        "r": torch.exp(t["a"]) + torch.log(t["b"]) + torch.tanh(t["a"]) + torch.sigmoid(t["a"])
    },
    "extremes": lambda t: {"r": torch.maximum(t["a"], t["b"]) + torch.minimum(t["a"], t["b"]) + t["a"].abs()},
    "clamp": lambda t: {"r": t["a"].clamp(min=-1.0, max=0.5) + t["a"].clamp(max=0.1)},
    "where": lambda t: {"r": torch.where(t["a"] > 0, t["b"], -t["a"]) + torch.where(t["a"] <= 1, 0.0, 1.0)},
    "reductions": lambda t: {
        "r": t["a"].sum() + t["a"].mean((0, 2)).amax() + t["a"].sum(-1, keepdim=True).amax(1)
    },
    "shapes": lambda t: {"r": t["a"].transpose(1, 2).reshape(8, 3)[:, 1:3].flatten().reshape(2, 2, 4)[:, 1]},
    "pieces": lambda t: {"r": torch.cat([p * i for i, p in enumerate(t["a"].split([1, 2], 1))], 1)},
    "stretch": lambda t: {"r": torch.slice_scatter(t["a"], t["b"][:, :, 1:3] * 2, 2, 1, 3)},
    "stretch_to_the_end": lambda t: {"r": torch.slice_scatter(t["a"], t["b"][:, 1:], 1, 1)},
    "whole": lambda t: {"r": torch.slice_scatter(t["a"], t["b"], 0)},
    "select": lambda t: {"r": t["a"][-1] + t["a"][0, 1] + t["a"].unbind(2)[3].sum()},
    "matrices": lambda t: {"r": t["a"] @ t["b"].transpose(1, 2)},
    "linear": lambda t: {"r": F.linear(t["a"], t["b"][0], t["a"][0, :, 1])},
    "softmax": lambda t: {"r": torch.softmax(t["a"], 1) + torch.log_softmax(t["a"], 2)},
    "layer_norm": lambda t: {"r": F.layer_norm(t["a"], (4,), t["b"][0, 0], t["b"][1, 0])},
    "convolution": lambda t: {"r": F.conv1d(t["a"], t["b"][:, :, :3])},
    "pool": lambda t: {"r": F.max_pool1d(t["a"], 3)},
    "argmax": lambda t: {"r": (t["a"].argmax(1) == 2).to(torch.float32)},
    "logic": lambda t: {
        "r": ((t["a"] > 0) & (t["b"] > 1)).to(torch.float32),
        "s": (t["a"] > 0) | (t["b"] > 1),
    },
    "types": lambda t: {"r": (t["a"] * 10).to(torch.int64) * 3 + torch.arange(4), "s": t["a"] >= 1},
    "filled": lambda t: {"r": torch.full_like(t["a"], 2.5) + torch.zeros(3, 1) + torch.ones(2048).sum()},
}


def assert_compiles(step: Step, example: dict[str, Tensor], rtol: float = 1e-6) -> None:
    graph = compile_graph(step, example)
    results = open_graph(graph.data).run(
        [OUTPUT_PREFIX + n for n in graph.outputs], {n: example[n].numpy() for n in graph.inputs}
    )
    expected = step(dict(example))
    assert graph.outputs == tuple(expected)
    for name, result in zip(graph.outputs, results, strict=True):
        wanted = expected[name].numpy()
        assert result.dtype == wanted.dtype
        np.testing.assert_allclose(result, wanted, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_function_has_the_values_of_torch(name: str) -> None:
    assert_compiles(STEPS[name], {"a": A, "b": POSITIVE})


@pytest.mark.parametrize("key", [0, 1, 12345, 2**31 - 1])
def test_random_numbers_in_a_graph_are_those_of_torch_to_the_bit(key: int) -> None:
    def step(t: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "small": randomness.bits(t["rng"], 5, (7,)),
            "large": randomness.bits(t["rng"], 5, (33, 50)),
            "uniform": randomness.uniform(t["rng"], 9, (40, 40)),
        }

    graph = compile_graph(step, {"rng": torch.tensor(3)})
    results = open_graph(graph.data).run(None, {"rng": np.asarray(key, np.int64)})
    for result, expected in zip(results, step({"rng": torch.tensor(key)}).values(), strict=True):
        np.testing.assert_array_equal(result, expected.numpy())


@pytest.mark.parametrize("first", [False, True])
def test_gradients_of_a_convolution_are_those_of_torch(first: bool) -> None:
    def step(t: dict[str, Tensor]) -> dict[str, Tensor]:
        def loss(kernel: Tensor, bias: Tensor, x: Tensor) -> Tensor:
            return (F.conv1d(x, kernel, bias) ** 2).sum()

        which = (0, 1) if first else (0, 1, 2)
        grads = torch.func.grad(loss, argnums=which)(t["kernel"], t["bias"], t["x"])
        return {f"g{i}": grad for i, grad in enumerate(grads)}

    generator = torch.Generator().manual_seed(0)
    example = {
        "x": torch.randn(3, 2, 11, generator=generator),
        "kernel": torch.randn(5, 2, 4, generator=generator),
        "bias": torch.randn(5, generator=generator),
    }
    assert_compiles(step, example, rtol=1e-5)


def test_an_input_without_influence_is_left_out() -> None:
    graph = compile_graph(lambda t: {"r": t["a"] + 1}, {"a": A, "b": POSITIVE})
    assert graph.inputs == ("a",)


@pytest.mark.parametrize(
    "name",
    [n if n in ("fedavg", "scaffold") else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES],
)
def test_compiling_twice_gives_the_same_bytes(name: str) -> None:
    options: dict[str, object] = {} if name == "scaffold" else {"momentum": 0.9}  # which needs plain SGD
    options |= {"weight_source": "warmup"} if name == "fedhealth2" else {}
    strategy, backbone = create_strategy(name, options), "transformer" if name == "epfl" else "cnn"
    one, two = (
        build_plan(strategy, strategy.network(model(backbone, seed=seed), 0), CONTRACT, plan_id="p")
        for seed in (1, 2)
    )
    assert one[0].to_bytes() == two[0].to_bytes()
    assert one[1] == two[1]
    assert Plan.from_bytes(one[0].to_bytes()) == one[0]


@pytest.mark.slow
def test_another_process_compiles_the_same_bytes() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from oracles.small_federation import CONTRACT, model\n"
        "from wearfleet_cloud.federated import create_strategy\n"
        "from wearfleet_cloud.federated.plan_builder import build_plan\n"
        "print(sorted(build_plan(create_strategy('fedavg', {}), model('transformer'), CONTRACT, plan_id='p')[1]))\n"
    )
    folder = next(p for p in sys.path if p.endswith("tests"))
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, folder],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "sha256:" in runs[0]


@pytest.mark.parametrize("backbone", ["cnn", pytest.param("transformer", marks=pytest.mark.slow)])
def test_graphs_hold_standard_operators_and_nothing_about_their_maker(backbone: str) -> None:
    _, graphs = build_plan(create_strategy("fedprox", {}), model(backbone), CONTRACT, plan_id="p")
    for data in graphs.values():
        assert operators_of(data)
        proto = onnx.load_model_from_string(data)
        onnx.checker.check_model(proto, full_check=True)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
        assert not proto.metadata_props
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


REFUSED: dict[str, tuple[Step, str]] = {
    "an operator without ONNX form": (lambda t: {"r": torch.linalg.svdvals(t["a"])}, "no ONNX form"),
    "an unchanged input": (lambda t: {"r": t["a"]}, "unchanged input"),
    "division by three": (lambda t: {"r": t["i"] // 3}, "power of two"),
    "division of negative numbers": (lambda t: {"r": (t["i"] - 5) // 4}, "cannot be negative"),
    "division after an overflow": (
        lambda t: {"r": ((t["i"] & 0xFFFFFFFF) * 2**32) // 4},
        "cannot be negative",
    ),
    "padded convolution": (
        lambda t: {"r": torch.func.grad(lambda k: F.conv1d(t["a"], k, padding=1).sum())(t["a"])},
        "stride 1, no padding",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what: str) -> None:
    step, reason = REFUSED[what]
    with pytest.raises(ConfigError, match=reason):
        compile_graph(step, {"a": A, "i": torch.arange(6)})


def test_a_model_and_a_contract_that_do_not_fit_are_refused() -> None:
    import dataclasses

    with pytest.raises(ConfigError, match="contract has"):
        build_plan(
            create_strategy("fedavg", {}), model("cnn"), dataclasses.replace(CONTRACT, window=41), plan_id="p"
        )
