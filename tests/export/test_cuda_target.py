"""The target cuda on a tiny model: what its graphs hold, and that they answer like those of the other targets.

`run_on_cpu` renames GatedDeltaNet, which CPUs have no kernel for, as the runtime does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.export.test_targets import HEAD
from tests.export.test_tensorrt_target import GRID, asked, portable, tower_inputs  # noqa: F401
from tests.runtime.cuda_child import SIZES
from tests.support.cuda_stubs import cuda_child, needs_wheel
from tests.support.graphs import Arrays, checked_proto, op_types, run_onnxruntime
from tests.support.quantized import WeightsInMemory, quantized_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.export.bfloat16 import computes_in_bfloat16, rounded
from zreward.export.graph import Graphs
from zreward.export.passes.packed_delta_net import GATED_DELTA_NET
from zreward.export.targets.cuda import lower_to_cuda
from zreward.export.weights import CheckpointTensor
from zreward.export.work import work_of
from zreward.quant.scheme import Scheme, resolve
from zreward.stand_ins import STAND_INS, with_stand_ins

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
SCHEMES = ("int4", "int8-weight", "int4-g16-asym,model.visual.*=int8-weight-g16-asym,*.down_proj=none")
MICROSOFT = {
    "CausalConvWithState",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "MatMulNBits",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
ON_CPU = {"Add", "Concat", "Gather", "Slice", "Squeeze"}
"""Arithmetic on shapes, which ONNX Runtime leaves on the CPU."""


@pytest.fixture(scope="module")
def quantized(checkpoint_path: Path) -> Callable[[str], WeightsInMemory]:
    """The tiny checkpoint's matrices rounded to nearest by a scheme."""
    floats = Checkpoint.open(checkpoint_path)
    shapes = {name: info.shape for name, info in floats.tensors.items()}
    return lambda scheme: quantized_checkpoint(floats, resolve(Scheme.parse(scheme), shapes).formats)[1]


def lowered(
    graphs: Graphs, dtype: ir.DataType = FLOAT, weights: WeightsInMemory | None = None, **how: bool
) -> Graphs:
    """A copy, lowered to ONNX Runtime on CUDA."""
    copy = Graphs(graphs.vision.clone(), graphs.decoder.clone())
    lower_to_cuda(copy, **{**HEAD, **how}, stored_type=dtype, quantized=weights)
    return copy


def run_on_cpu(model: ir.Model, inputs: Arrays, **how: Any) -> Arrays:
    renamed = with_stand_ins(checked_proto(model).SerializeToString())
    return run_onnxruntime(ir.from_proto(onnx.ModelProto.FromString(renamed)), inputs, optimized=True, **how)


def asked_here(model: ir.Model, states: int) -> Arrays:
    """What `asked` gives, with the states in the layout of this target."""
    inputs = asked(model, states)
    for value in model.graph.inputs:
        name = str(value.name)
        if name.endswith((".conv_state", ".recurrent_state")):
            shape = [size for size in value.shape if isinstance(size, int)]
            drawn = np.random.default_rng(len(name)).standard_normal((states, *shape))
            inputs[name] = drawn.astype(np.float32)
    return inputs


def in_layout(inputs: Arrays, copies: int) -> Arrays:
    """Inputs of this target as the portable one takes them: channels before taps, keys before values, and copied."""
    turned = {}
    for name, array in inputs.items():
        if name.startswith("past_key_values."):
            array = np.repeat(array, copies, axis=0)
        if name.endswith((".conv_state", ".recurrent_state")):
            array = np.ascontiguousarray(np.swapaxes(array, -1, -2))
        turned[name] = array
    return turned


def distances(found: Graphs, expected: Graphs) -> dict[str, float]:
    """Largest differences of features and states, relative to the largest value, and of answers."""
    here = run_on_cpu(found.vision, tower_inputs(found.vision))["image_features"]
    there = run_onnxruntime(expected.vision, tower_inputs(expected.vision))["image_features"]
    inputs = asked_here(found.decoder, 1)
    answers = run_on_cpu(found.decoder, inputs)
    inputs = in_layout(inputs, 4)
    inputs["attention_mask"] = np.ones((4, 17), np.int64)
    asked_there = {v.name for v in expected.decoder.graph.inputs}
    exact = run_onnxruntime(expected.decoder, {n: a for n, a in inputs.items() if n in asked_there})
    exact = {
        n: np.swapaxes(a, -1, -2) if n.endswith((".conv_state", ".recurrent_state")) else a
        for n, a in exact.items()
    }
    assert set(answers) == set(exact)
    states = [name for name in exact if name.startswith("present")]
    return {
        "features": float(np.abs(here - there).max() / np.abs(there).max()),
        "states": max(float(np.abs(answers[n] - exact[n]).max() / np.abs(exact[n]).max()) for n in states),
        "probs": float(np.abs(answers["probs"] - exact["probs"]).max()),
        "mean": float(np.abs(answers["mean"] - exact["mean"]).max()),
    }


def test_floats_answer_as_on_the_other_targets(built_graphs: Graphs, portable: Graphs) -> None:  # noqa: F811
    """Four questions run from one state here, and from four copies of it there."""
    found = distances(lowered(built_graphs), portable)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("dtype", "most"), [(HALF, 2e-2), (BFLOAT, 1e-1)])
def test_16_bits_stay_near(
    built_graphs: Graphs,
    portable: Graphs,  # noqa: F811
    dtype: ir.DataType,
    most: float,
) -> None:
    graphs = lowered(built_graphs, dtype)
    if dtype is BFLOAT:  # ONNX Runtime has no such products on CPUs
        assert all(computes_in_bfloat16(checked_proto(model)) for model in (graphs.vision, graphs.decoder))
        graphs = Graphs(*(ir.from_proto(rounded(checked_proto(m))) for m in (graphs.vision, graphs.decoder)))
    found = distances(graphs, portable)
    assert all(1e-6 < value < most for value in found.values()), found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_answer_like_the_dequantized_model(
    built_graphs: Graphs, quantized: Callable[[str], WeightsInMemory], scheme: str
) -> None:
    weights = quantized(scheme)
    floats = lowered(built_graphs)
    for model in (floats.vision, floats.decoder):
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, CheckpointTensor) and tensor.layout.source in weights.matrices:
                matrix = weights.matrices[tensor.layout.source].dequantized()
                value.const_value = ir.tensor(matrix.T.copy(), name=value.name)
    codes = lowered(built_graphs, FLOAT, weights)
    assert "MatMulNBits" in op_types(codes.vision) and "MatMulNBits" in op_types(codes.decoder)
    inputs = asked_here(floats.decoder, 1)
    found, expected = run_on_cpu(codes.decoder, inputs), run_on_cpu(floats.decoder, inputs)
    assert np.abs(found["probs"] - expected["probs"]).max() < 1e-5
    found, expected = (run_on_cpu(g.vision, tower_inputs(g.vision)) for g in (codes, floats))
    assert np.abs(found["image_features"] - expected["image_features"]).max() < 1e-4


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("scheme", [None, *SCHEMES[:1]])
def test_operators_are_those_of_the_provider(
    built_graphs: Graphs,
    quantized: Callable[[str], WeightsInMemory],
    dtype: ir.DataType,
    scheme: str | None,
) -> None:
    graphs = lowered(built_graphs, dtype, quantized(scheme) if scheme else None, label_mass=True)
    for model in (graphs.vision, graphs.decoder):
        proto = checked_proto(model)
        assert {entry.domain: entry.version for entry in proto.opset_import}[""] == 24
        foreign = {node.op_type for node in model.graph if node.domain == "com.microsoft"}
        assert foreign <= MICROSOFT
        assert all(
            node.op_identifier() in model.functions for node in model.graph if node.domain == "zreward"
        )
        assert not [name for name in model.functions if name[0] == "com.microsoft"]
        narrow = [v for v in model.graph.initializers.values() if v.dtype is dtype]
        assert dtype is FLOAT or len(narrow) > 4
        for node in model.graph:  # nothing is cast to float32 and back
            source = node.inputs[0].producer() if node.op_type == "Cast" else None
            if source is not None and source.op_type == "Cast":
                assert node.outputs[0].dtype is not source.inputs[0].dtype
    assert STAND_INS["com.microsoft", GATED_DELTA_NET] in {name[:2] for name in graphs.decoder.functions}
    states = {v.name: v.dtype for v in graphs.decoder.graph.outputs}
    assert set(states.values()) == {FLOAT}


def test_the_work_is_that_of_the_other_targets(built_graphs: Graphs, portable: Graphs) -> None:  # noqa: F811
    assert work_of(lowered(built_graphs, HALF)) == work_of(portable)


@needs_wheel
def test_every_operator_runs_on_the_gpu(
    built_graphs: Graphs,
    quantized: Callable[[str], WeightsInMemory],
    cuda_stubs: Path,
    tmp_path: Path,
) -> None:
    """L2: the real provider takes every node, and its kernels take the sizes that scoring has.

    Shapes follow from arithmetic that runs on the CPU; what kernels compute cannot be seen without a GPU. Every format
    of weights is in test_nbits_products.
    """
    cases = [(FLOAT, None), (HALF, None), (BFLOAT, None), (BFLOAT, SCHEMES[1]), (HALF, SCHEMES[2])]
    for number, (dtype, scheme) in enumerate(cases):
        graphs = lowered(built_graphs, dtype, quantized(scheme) if scheme else None)
        for name, model in (("vision", graphs.vision), ("decoder", graphs.decoder)):
            (tmp_path / f"{name}-{number}.onnx").write_bytes(checked_proto(model).SerializeToString())
    found = cuda_child(cuda_stubs, "graphs", tmp_path)
    assert len(found) == 2 * len(cases)
    for name, outcome in found.items():
        assert "error" not in outcome, (name, outcome)
        assert set(outcome["cpu"]) <= ON_CPU, name
        for sizes, shapes in zip(SIZES, outcome["shapes"], strict=True):
            if name.startswith("vision"):
                assert shapes["image_features"] == [sizes["total_patches"] // 4, 64]
            else:
                assert shapes["probs"] == [sizes["batch"], 9]
                past = sizes["past_sequence_len"] + sizes["sequence_len"]
                assert shapes["present.3.key"] == [sizes["batch"], 2, past, 32]
                assert shapes["present.0.recurrent_state"] == [sizes["batch"], 4, 16, 16]
                assert shapes["present.0.conv_state"] == [sizes["batch"], 3, 128]
