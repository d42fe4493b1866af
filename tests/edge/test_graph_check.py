"""What a device accepts as a graph, read without the onnx package; onnx itself is the oracle."""

import numpy as np
import onnx
import pytest
from edge.tiny_graphs import TENSORS, make_release, onnx_proto, train_graph
from onnx import TensorProto, helper, numpy_helper
from wearfleet_edge.graph import inspect_graph, overlay_tensors
from wearfleet_edge.operators import ALLOWED_OPERATORS, HIGHEST_OPSET
from wearfleet_protos.errors import IntegrityError, ModelContractError


def _proto(nodes, opset=18, **graph_fields):
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [], [out], **graph_fields)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_every_allowed_operator_is_a_standard_one():
    standard = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    assert standard >= ALLOWED_OPERATORS
    assert not ALLOWED_OPERATORS & {"If", "Loop", "Scan", "RandomNormal", "RandomUniform", "SequenceMap"}


def test_summary_equals_what_onnx_reads():
    data, _ = make_release()
    summary = inspect_graph(data)
    proto = onnx_proto(data)
    assert summary.operators == {n.op_type for n in proto.graph.node}
    assert summary.metadata == {p.key: p.value for p in proto.metadata_props}
    assert {n: (i.dtype, i.shape) for n, i in summary.initializers.items()} == {
        i.name: (str(numpy_helper.to_array(i).dtype), numpy_helper.to_array(i).shape)
        for i in proto.graph.initializer
    }


def test_overlay_changes_the_named_constants_and_nothing_else():
    data, _ = make_release()
    bias = np.array([3.5, -1.25], np.float32)
    patched = onnx_proto(bytes(overlay_tensors(data, inspect_graph(data), {"head.bias": bias})))
    original = onnx_proto(data)
    for before, after in zip(original.graph.initializer, patched.graph.initializer, strict=True):
        wanted = bias if before.name == "head.bias" else numpy_helper.to_array(before)
        np.testing.assert_array_equal(numpy_helper.to_array(after), wanted)
    for graph in (original, patched):
        del graph.graph.initializer[:]
    assert original == patched


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("head.bias", np.zeros(3, np.float32)),
        ("head.bias", np.zeros(2, np.float64)),
        ("head.other", np.zeros(2, np.float32)),
    ],
)
def test_overlay_refuses_a_tensor_that_does_not_fit(name, array):
    data, _ = make_release()
    with pytest.raises(ModelContractError, match=name):
        overlay_tensors(data, inspect_graph(data), {name: array})


def test_overlay_refuses_a_constant_that_is_not_stored_as_raw_bytes():
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    data = _proto([helper.make_node("Identity", ["w"], ["out"])], initializer=[tensor]).SerializeToString()
    with pytest.raises(ModelContractError, match="raw bytes"):
        overlay_tensors(data, inspect_graph(data), {"w": np.zeros(2, np.float32)})


def _branch():
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])
    return helper.make_graph([], "branch", [], [out])


FORBIDDEN = {
    "custom domain": (
        _proto([helper.make_node("Relu", ["a"], ["out"], domain="com.microsoft")]),
        "com.microsoft",
    ),
    "unknown operator": (_proto([helper.make_node("Evil", ["a"], ["out"])]), "Evil"),
    "randomness": (_proto([helper.make_node("RandomNormal", [], ["out"], shape=[1])]), "RandomNormal"),
    "control flow": (_proto([helper.make_node("If", ["a"], ["out"], then_branch=_branch())]), "If"),
    "graph attribute": (_proto([helper.make_node("Relu", ["a"], ["out"], body=_branch())]), "control flow"),
    "old opset": (_proto([], opset=6), "opset 6"),
    "future opset": (_proto([], opset=HIGHEST_OPSET + 1), "opset"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_forbidden_graph_is_refused(case):
    proto, words = FORBIDDEN[case]
    with pytest.raises(IntegrityError, match=words):
        inspect_graph(proto.SerializeToString())


@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_tensor_outside_the_file_is_refused(where):
    tensor = TensorProto(name="w", dims=[1], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    if where == "initializer":
        proto = _proto([helper.make_node("Identity", ["w"], ["out"])], initializer=[tensor])
    else:
        proto = _proto([helper.make_node("Constant", [], ["out"], value=tensor)])
    with pytest.raises(IntegrityError, match="outside its file"):
        inspect_graph(proto.SerializeToString())


def test_local_function_is_refused():
    proto = _proto([])
    proto.functions.add(name="F", domain="mine")
    with pytest.raises(IntegrityError, match="functions"):
        inspect_graph(proto.SerializeToString())


def test_truncation_anywhere_is_an_integrity_error_or_still_one_graph():
    data = train_graph()
    refused = 0
    for size in range(0, len(data), 7):
        try:
            inspect_graph(data[:size])
        except IntegrityError:
            refused += 1
    assert refused >= len(range(0, len(data), 7)) - 2  # a cut between two whole fields leaves valid protobuf


def test_random_bytes_never_raise_anything_but_integrity_errors():
    generator = np.random.default_rng(0)
    data = bytearray(make_release()[0])
    for _ in range(300):
        junk = bytearray(data)
        for at in generator.integers(0, len(junk), 3):
            junk[at] = generator.integers(0, 256)
        try:
            inspect_graph(bytes(junk))
        except IntegrityError:
            continue
    assert set(inspect_graph(bytes(data)).initializers) >= TENSORS.keys() - {"norm.count"}
