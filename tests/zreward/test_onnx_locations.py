"""zreward.onnx_locations against the onnx package: every place that can hold a tensor, and damaged files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from zreward.errors import BundleError
from zreward.onnx_locations import _CHILDREN, external_locations


def external(location: str | None = "w.data", name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"offset": "0", "location": location, "length": "8"}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def graph_of(*tensors: TensorProto, nodes: tuple[NodeProto, ...] = ()) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    return helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"]), *nodes], "g", [x], [y], list(tensors)
    )


def model_of(*tensors: TensorProto, nodes: tuple[NodeProto, ...] = ()) -> ModelProto:
    graph = graph_of(*tensors, nodes=nodes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def node_with(**attribute: object) -> NodeProto:
    node = NodeProto(op_type="Any")
    node.attribute.append(AttributeProto(name="value", **attribute))
    return node


def locations(folder: Path, model: ModelProto | bytes) -> set[str]:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return external_locations(path)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_initializers(tmp_path: Path) -> None:
    inline = numpy_helper.from_array(np.arange(500, dtype=np.float32), "inline")
    assert locations(tmp_path, model_of(inline)) == set()
    tensors = [external("a.data", "a"), inline, external("../b.data", "b"), external("a.data", "c")]
    assert locations(tmp_path, model_of(*tensors)) == {"a.data", "../b.data"}


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=external(location), indices=external(location + ".index"))


def model_with_function() -> ModelProto:
    model = model_of()
    function = model.functions.add(name="F", domain="d")
    function.node.append(node_with(t=external("body")))
    function.attribute_proto.append(AttributeProto(name="default", t=external("default")))
    return model


def model_with_sparse() -> ModelProto:
    model = model_of()
    model.graph.sparse_initializer.append(sparse("s"))
    return model


def model_with_training() -> ModelProto:
    model = model_of()
    info = model.training_info.add()
    info.initialization.CopyFrom(graph_of(external("first")))
    info.algorithm.CopyFrom(graph_of(external("second")))
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (model_of(nodes=(node_with(t=external("t")),)), {"t"}),
        (model_of(nodes=(node_with(tensors=[external("t"), external("u")]),)), {"t", "u"}),
        (model_of(nodes=(node_with(g=graph_of(external("g"))),)), {"g"}),
        (model_of(nodes=(node_with(graphs=[graph_of(), graph_of(external("g"))]),)), {"g"}),
        (model_of(nodes=(node_with(g=graph_of(nodes=(node_with(t=external("deep")),))),)), {"deep"}),
        (model_of(nodes=(node_with(sparse_tensor=sparse("s")),)), {"s", "s.index"}),
        (model_of(nodes=(node_with(sparse_tensors=[sparse("s")]),)), {"s", "s.index"}),
        (model_with_sparse(), {"s", "s.index"}),
        (model_with_function(), {"body", "default"}),
        (model_with_training(), {"first", "second"}),
        (model_of(external("ä/雪.data")), {"ä/雪.data"}),
        (model_of(external("")), {""}),
        (model_of(external(None)), set()),
    ],
)
def test_every_place_that_can_hold_a_tensor(tmp_path: Path, model: ModelProto, expected: set[str]) -> None:
    assert locations(tmp_path, model) == expected


def test_no_field_of_the_format_that_leads_to_a_tensor_is_forgotten() -> None:
    """Follow onnx's own descriptors from the model down, instead of our table."""
    fields: dict[str, dict[int, str]] = {}
    waiting = [ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        children = {f.number: f.message_type for f in message.fields if f.message_type is not None}
        fields[message.name] = {number: child.name for number, child in children.items()}
        waiting += [child for child in children.values() if child.name not in fields]
    leading = {"TensorProto"}
    while more := {m for m, c in fields.items() if m not in leading and leading & set(c.values())}:
        leading |= more
    expected = {
        message.removesuffix("Proto"): {
            number: child.removesuffix("Proto")
            for number, child in fields[message].items()
            if child in leading
        }
        for message in leading - {"TensorProto"}
    }
    expected["Training"] = expected.pop("TrainingInfo")
    expected["Model"] = {n: c.replace("TrainingInfo", "Training") for n, c in expected["Model"].items()}
    assert {m: c for m, c in _CHILDREN.items() if m not in ("Tensor", "Entry")} == expected
    assert list(_CHILDREN["Tensor"]) == [TensorProto.EXTERNAL_DATA_FIELD_NUMBER]


def test_a_tag_that_onnx_runtime_reads_as_another_field_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime drops bits above 32 of a tag, so this graph is one to it and an unknown field to others."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(external())
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    np.array([1, 2], dtype=np.float32).tofile(tmp_path / "w.data")
    hidden = model.SerializeToString() + varint((7 << 3 | 2) + (1 << 32)) + varint(len(graph)) + graph
    with pytest.raises(BundleError, match="out of range"):
        locations(tmp_path, hidden)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.zeros(2, np.float32)})[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff" * 30,
        b"\x3a\x7f\x01",  # a graph longer than the file
        b"\x3b\x00",  # a group, which onnx.proto does not have
        b"\x08\x80",  # a number that does not end
        b"\x09\x00",  # a fixed64 that is cut
        b"\x00\x00",  # field number zero
        b"This is not a model.",
        model_of(external()).SerializeToString()[:-3],
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damaged: bytes) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: not an ONNX file, or damaged"):
        locations(tmp_path, damaged)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.onnx: cannot be read"):
        external_locations(tmp_path / "nowhere.onnx")


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    graph = graph_of(external("deep"))
    for _ in range(25):
        graph = graph_of(nodes=(node_with(g=graph),))
    with pytest.raises(BundleError, match="nested too deeply"):
        locations(tmp_path, helper.make_model(graph))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_locations_or_a_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    with contextlib.suppress(BundleError):
        assert isinstance(locations(tmp_path_factory.getbasetemp(), data), set)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_altered_byte_hides_a_location_from_us_that_onnx_sees(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(model_of(external("../w.data")).SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        seen = locations(tmp_path_factory.getbasetemp(), bytes(raw))
    except BundleError:
        return
    try:
        theirs = ModelProto.FromString(bytes(raw))
    except Exception:  # protobuf's own DecodeError; not a model, so nothing to compare
        return
    entries = (e for tensor in theirs.graph.initializer for e in tensor.external_data)
    assert {e.value for e in entries if e.key == "location"} <= seen
