"""Operators renamed in the wire format, against onnx."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from zreward.errors import BundleError
from zreward.onnx_names import with_names
from zreward.stand_ins import STAND_INS, needs_stand_ins, with_stand_ins

TEXT = """
<ir_version: 10, opset_import: ["": 24, "com.microsoft": 1, "zreward": 1], producer_name: "test">
g (float[n, 3] x) => (float[n, 3] y) <float[3] w = {1, 2, 3}> {
  a = Relu(x)
  b = com.microsoft.GatedDeltaNet <scale: float = 0.5, gate_activation: string = "qwen"> (a, , w)
  c = Add(b, w)
  y = zreward.GatedDeltaNet(c)
}"""


def test_a_node_is_renamed_and_nothing_else() -> None:
    model = onnx.parser.parse_model(TEXT)
    model.graph.node[0].doc_string = "GatedDeltaNet"
    found = onnx.ModelProto.FromString(with_stand_ins(model.SerializeToString()))
    model.graph.node[1].domain, model.graph.node[1].op_type = STAND_INS["com.microsoft", "GatedDeltaNet"]
    assert found == model


def test_domains_are_imported_and_the_standard_one_is_a_domain() -> None:
    model = onnx.parser.parse_model(TEXT)
    names = {("", "Relu"): ("other", "Rectifier"), ("zreward", "GatedDeltaNet"): ("", "Identity")}
    found = onnx.ModelProto.FromString(with_names(model.SerializeToString(), names, {"other": 7}))
    model.graph.node[0].domain, model.graph.node[0].op_type = "other", "Rectifier"
    model.graph.node[3].domain, model.graph.node[3].op_type = "", "Identity"
    model.opset_import.append(helper.make_opsetid("other", 7))
    assert [(n.domain, n.op_type) for n in found.graph.node] == [
        (n.domain, n.op_type) for n in model.graph.node
    ]
    assert found.opset_import == model.opset_import and found.graph.initializer == model.graph.initializer


def test_a_model_without_stand_ins_is_told_apart() -> None:
    model = onnx.parser.parse_model(TEXT)
    assert not needs_stand_ins(model.SerializeToString())
    name = STAND_INS["com.microsoft", "GatedDeltaNet"][1]
    model.functions.append(helper.make_function("zreward", name, [], [], [], []))
    assert needs_stand_ins(model.SerializeToString())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_damage_is_an_error_or_another_file(cut: int, noise: bytes) -> None:
    data = onnx.parser.parse_model(TEXT).SerializeToString()
    damaged = data[: cut % len(data)] + noise
    try:
        with_stand_ins(damaged)
    except BundleError as error:
        assert "not an ONNX file" in str(error)


def test_no_protobuf_is_an_error() -> None:
    with pytest.raises(BundleError, match="not an ONNX file"):
        with_stand_ins(b"\xff" * 40)
