"""A model and a plan small enough to follow by hand: channel means, minus a running mean, into softmax regression."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from wearfleet_protos.codecs import FLOAT32
from wearfleet_protos.manifest import ModelManifest, metadata_of
from wearfleet_protos.plan import (
    Budget,
    InputBinding,
    InputContract,
    Loop,
    OutputBinding,
    Phase,
    Plan,
    UploadSpec,
)
from wearfleet_protos.recording import Channel, Recording
from wearfleet_protos.tensors import TensorGroup, TensorRole, TensorSpec, digest_of, schema_hash

CHANNELS = (Channel("acc_x", "m/s^2"), Channel("acc_y", "m/s^2"), Channel("acc_z", "m/s^2"))
LABELS = ("sitting", "walking")
CONTRACT = InputContract(CHANNELS, 20.0, 8, 4, LABELS)
BATCH = 4

WEIGHT = np.array([[1.0, 0.0, 0.5], [-1.0, 0.25, 0.0]], np.float32)
BIAS = np.array([0.125, -0.125], np.float32)
MEAN = np.zeros(3, np.float32)

SPECS = (
    TensorSpec("head.bias", "float32", (2,), TensorRole.HEAD, TensorGroup.PARAM),
    TensorSpec("head.weight", "float32", (2, 3), TensorRole.HEAD, TensorGroup.PARAM),
    TensorSpec("norm.count", "int64", (), TensorRole.COUNTER, TensorGroup.BUFFER),
    TensorSpec("norm.mean", "float32", (3,), TensorRole.NORM_STAT, TensorGroup.BUFFER),
)
TENSORS = {"head.bias": BIAS, "head.weight": WEIGHT, "norm.count": np.array(0, np.int64), "norm.mean": MEAN}


def _value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def _model_proto(nodes, inputs, outputs, initializers=(), metadata=None):
    graph = helper.make_graph(
        nodes, "tiny", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in initializers]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if metadata is not None:
        helper.set_model_props(proto, metadata)
    return proto.SerializeToString(deterministic=True)


def _feature_nodes(x):
    return [
        helper.make_node("ReduceMean", [x, "axis_time"], ["means"], keepdims=0),
        helper.make_node("Sub", ["means", "norm.mean"], ["embedding"]),
        helper.make_node("Gemm", ["embedding", "head.weight", "head.bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]


AXES = (("axis_time", np.array([2], np.int64)), ("axis_class", np.array([1], np.int64)))


def model_bytes(metadata, *, drop_output=None, extra_nodes=()):
    nodes = [
        *_feature_nodes("window"),
        helper.make_node("ReduceMax", ["logits", "axis_class"], ["top"], keepdims=0),
        helper.make_node("Neg", ["top"], ["ood_score"]),
        *extra_nodes,
    ]
    outputs = [
        _value("logits", TensorProto.FLOAT, ["N", 2]),
        _value("probabilities", TensorProto.FLOAT, ["N", 2]),
        _value("embedding", TensorProto.FLOAT, ["N", 3]),
        _value("ood_score", TensorProto.FLOAT, ["N"]),
    ]
    constants = [(n, a) for n, a in TENSORS.items() if n != "norm.count"]
    return _model_proto(
        nodes,
        [_value("window", TensorProto.FLOAT, ["N", 3, 8])],
        [o for o in outputs if o.name != drop_output],
        [*constants, *AXES],
        metadata,
    )


def make_release(version=1, **faults):
    """(ONNX bytes, manifest) of the tiny model; ``faults`` go to :func:`model_bytes`."""
    wrong_metadata = faults.pop("metadata", {})
    provisional = ModelManifest(
        model_id="tiny",
        version=version,
        digest=digest_of(b""),
        size_bytes=1,
        contract=CONTRACT,
        ood_method="energy",
        ood_threshold=0.5,
        tensors=SPECS,
        train_run="run-1",
        license="Apache-2.0",
        created_ns=1,
        simulated=True,
    )
    metadata = {k: v for k, v in {**metadata_of(provisional), **wrong_metadata}.items() if v is not None}
    data = model_bytes(metadata, **faults)
    return data, replace(provisional, digest=digest_of(data), size_bytes=len(data))


def reference_logits(x, tensors=TENSORS):
    """(N, 2) by NumPy, float64."""
    features = x.astype(np.float64).mean(axis=2) - tensors["norm.mean"]
    return features @ tensors["head.weight"].T.astype(np.float64) + tensors["head.bias"]


@dataclass(frozen=True)
class TinyPlan:
    plan: Plan
    graphs: dict[str, bytes]


def _metric_nodes():
    return [
        helper.make_node("OneHot", ["y", "depth", "off_on"], ["wanted"], axis=1),
        helper.make_node("LogSoftmax", ["logits"], ["log_p"], axis=1),
        helper.make_node("Mul", ["log_p", "wanted"], ["picked"]),
        helper.make_node("ReduceSum", ["picked", "axis_class"], ["log_likelihood"], keepdims=0),
        helper.make_node("Mul", ["log_likelihood", "weight"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted"], ["likelihood_sum"], keepdims=0),
        helper.make_node("Neg", ["likelihood_sum"], ["loss_sum"]),
        helper.make_node("ArgMax", ["logits"], ["said"], axis=1, keepdims=0),
        helper.make_node("Equal", ["said", "y"], ["hit"]),
        helper.make_node("Cast", ["hit"], ["hit_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["hit_float", "weight"], ["hit_weighted"]),
        helper.make_node("ReduceSum", ["hit_weighted"], ["correct"], keepdims=0),
        helper.make_node("ReduceSum", ["weight"], ["count"], keepdims=0),
    ]


CONSTANTS = (
    *AXES,
    ("axis_batch", np.array([0], np.int64)),
    ("depth", np.array(2, np.int64)),
    ("off_on", np.array([0, 1], np.float32)),
    ("one_count", np.array(1, np.int64)),
)
STATE_INPUTS = [
    _value("head.bias", TensorProto.FLOAT, [2]),
    _value("head.weight", TensorProto.FLOAT, [2, 3]),
    _value("norm.mean", TensorProto.FLOAT, [3]),
]
BATCH_INPUTS = [
    _value("x", TensorProto.FLOAT, [BATCH, 3, 8]),
    _value("y", TensorProto.INT64, [BATCH]),
    _value("weight", TensorProto.FLOAT, [BATCH]),
]
METRICS = [_value(n, TensorProto.FLOAT, []) for n in ("loss_sum", "correct", "count")]


WIDE = TensorSpec("wide", "float32", (300,), TensorRole.HEAD, TensorGroup.PARAM)
WIDE_STEP = np.random.default_rng(5).normal(0, 1e-3, 300).astype(np.float32)
"""A tensor large enough for a codec, and what every training step adds to it."""


def train_graph(*, wide=False):
    """One step of gradient descent on the head; the running mean moves to nowhere, the counter counts."""
    nodes = [
        *_feature_nodes("x"),
        *_metric_nodes(),
        helper.make_node("Sub", ["probabilities", "wanted"], ["error"]),
        helper.make_node("Unsqueeze", ["weight", "axis_class"], ["column"]),
        helper.make_node("Mul", ["error", "column"], ["error_weighted"]),
        helper.make_node("Div", ["error_weighted", "count"], ["gradient"]),
        helper.make_node("Gemm", ["gradient", "embedding"], ["weight_gradient"], transA=1),
        helper.make_node("ReduceSum", ["gradient", "axis_batch"], ["bias_gradient"], keepdims=0),
        helper.make_node("Mul", ["weight_gradient", "lr"], ["weight_step"]),
        helper.make_node("Mul", ["bias_gradient", "lr"], ["bias_step"]),
        helper.make_node("Sub", ["head.weight", "weight_step"], ["new/head.weight"]),
        helper.make_node("Sub", ["head.bias", "bias_step"], ["new/head.bias"]),
        helper.make_node("Add", ["norm.count", "one_count"], ["new/norm.count"]),
        helper.make_node("Mul", ["embedding", "column"], ["embedding_weighted"]),
        helper.make_node("ReduceSum", ["embedding_weighted", "axis_batch"], ["shift_sum"], keepdims=0),
        helper.make_node("Div", ["shift_sum", "count"], ["shift"]),
        helper.make_node("Add", ["norm.mean", "shift"], ["new/norm.mean"]),
    ]
    outputs = [
        _value("new/head.bias", TensorProto.FLOAT, [2]),
        _value("new/head.weight", TensorProto.FLOAT, [2, 3]),
        _value("new/norm.count", TensorProto.INT64, []),
        _value("new/norm.mean", TensorProto.FLOAT, [3]),
    ]
    inputs = [
        *STATE_INPUTS,
        _value("norm.count", TensorProto.INT64, []),
        *BATCH_INPUTS,
        _value("lr", TensorProto.FLOAT, []),
    ]
    constants = CONSTANTS
    if wide:
        nodes.append(helper.make_node("Add", ["wide", "wide_step"], ["new/wide"]))
        inputs.append(_value("wide", TensorProto.FLOAT, [300]))
        outputs.append(_value("new/wide", TensorProto.FLOAT, [300]))
        constants = (*CONSTANTS, ("wide_step", WIDE_STEP))
    return _model_proto(nodes, inputs, [*outputs, *METRICS], constants)


def evaluate_graph():
    return _model_proto(
        [*_feature_nodes("x"), *_metric_nodes()], [*STATE_INPUTS, *BATCH_INPUTS], METRICS, CONSTANTS
    )


def reference_step(tensors, x, y, lr):
    """The training step by NumPy in float64, on a batch without padding."""
    features = x.astype(np.float64).mean(axis=2) - tensors["norm.mean"]
    logits = features @ tensors["head.weight"].T + tensors["head.bias"]
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient = (exp / exp.sum(axis=1, keepdims=True) - np.eye(2)[y]) / len(y)
    return {
        "head.weight": tensors["head.weight"] - lr * gradient.T @ features,
        "head.bias": tensors["head.bias"] - lr * gradient.sum(axis=0),
        "norm.mean": tensors["norm.mean"] + features.mean(axis=0),
        "norm.count": tensors["norm.count"] + 1,
    }


def make_plan(*, local_norms=True, epochs=2, lr=0.5, budget=None, graph=None, codec=None):
    """(plan, graphs): measure, train, measure; with ``local_norms`` the running mean stays on the device.

    With a ``codec`` there is a tensor ``wide`` that is large enough for it, beside those of the model.
    """
    train, evaluate = graph or train_graph(wide=codec is not None), evaluate_graph()
    keep = (TensorRole.NORM_STAT,) if local_norms else ()
    tensors = tuple(replace(s, origin="local") if s.role in keep else s for s in SPECS)
    moving = ("norm.count",)
    if codec is not None:
        tensors, moving = (*tensors, WIDE), ("norm.count", "wide")
    state = ("head.bias", "head.weight", "norm.mean")
    batch = ("x", "y", "weight")
    metrics = tuple(OutputBinding(n, "metric", n, "sum") for n in ("loss_sum", "correct", "count"))
    reading = tuple(InputBinding(n, "state", n) for n in state) + tuple(
        InputBinding(n, "batch", n) for n in batch
    )

    def measure(name):
        return Phase(
            name,
            digest_of(evaluate),
            len(evaluate),
            reading,
            metrics,
            Loop("holdout", BATCH, 1, 0, False),
            (),
        )

    learn = Phase(
        "train",
        digest_of(train),
        len(train),
        (
            *reading,
            *(InputBinding(n, "state", n) for n in moving),
            InputBinding("lr", "scalar", "lr"),
        ),
        (*(OutputBinding(f"new/{n}", "state", n) for n in (*state, *moving)), *metrics),
        Loop("train", BATCH, epochs, 0, True),
        (("lr", lr),),
    )
    roles = tuple(r for r in (TensorRole.HEAD, TensorRole.NORM_STAT, TensorRole.COUNTER) if r not in keep)
    plan = Plan(
        plan_id="plan-1",
        strategy="fedbn" if local_norms else "fedavg",
        strategy_version=1,
        model_schema_hash=schema_hash(SPECS),
        contract=CONTRACT,
        tensors=tensors,
        phases=(measure("evaluate_before"), learn, measure("evaluate_after")),
        upload=UploadSpec(roles, (TensorGroup.PARAM, TensorGroup.BUFFER), "delta", codec or FLOAT32),
        keep_local=keep,
        budget=budget or Budget(60.0, 1 << 20, 2),
        seed=11,
    )
    return TinyPlan(plan, {digest_of(train): train, digest_of(evaluate): evaluate})


def make_recording(seconds=20.0, rate_hz=20.0, seed=0):
    """One person: sits, then walks; the classes differ in the channel means."""
    generator = np.random.default_rng(seed)
    half = int(seconds * rate_hz / 2)
    sitting = generator.normal((1.0, 0.0, 2.0), 0.5, (half, 3))
    walking = generator.normal((-1.0, 1.0, 2.5), 0.5, (half, 3))
    samples = np.concatenate((sitting, walking)).astype(np.float32)
    labels = np.repeat(np.array([0, 1], np.int16), half)
    return Recording(samples, labels, rate_hz, CHANNELS, "anna", "wrist", "test", "2024-01-01")


def onnx_proto(data):
    return onnx.load_from_string(data)
