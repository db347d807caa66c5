"""The target tensorrt on a tiny model: what its graphs hold, and that they answer like those of the other targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.export.passes.test_plain_attention import decoder_inputs
from tests.export.test_targets import HEAD
from tests.support.graphs import Arrays, checked_proto, op_types, run_onnxruntime, run_reference
from tests.support.quantized import WeightsInMemory, quantized_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.export.bfloat16 import computes_in_bfloat16, rounded
from zreward.export.graph import Graphs
from zreward.export.passes.causal_conv import CAUSAL_CONV_1D
from zreward.export.passes.delta_rule import GATED_DELTA_RULE
from zreward.export.passes.qdq_products import TENSORRT_GROUPS
from zreward.export.passes.score_head import RUBRIC_EXPECTATION
from zreward.export.targets.portable import lower_to_portable
from zreward.export.targets.tensorrt import lower_to_tensorrt
from zreward.export.weights import CheckpointTensor
from zreward.export.work import work_of
from zreward.image import Patches
from zreward.quant.scheme import Scheme, resolve

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
SCHEMES = ("int8-static", "int8-weight", "int4", "fp8")
GRID = (4, 6)


@pytest.fixture(scope="module")
def quantized(checkpoint_path: Path) -> Callable[[str], WeightsInMemory]:
    """The tiny checkpoint's matrices rounded to nearest by a scheme, with one scale for all inputs."""
    floats = Checkpoint.open(checkpoint_path)
    shapes = {name: info.shape for name, info in floats.tensors.items()}

    def quantize(scheme: str) -> WeightsInMemory:
        formats = resolve(Scheme.parse(scheme, TENSORRT_GROUPS), shapes).formats
        _, weights = quantized_checkpoint(floats, formats)
        weights.scales = dict.fromkeys(weights.matrices, 0.05)
        return weights

    return quantize


def lowered(
    graphs: Graphs, dtype: ir.DataType = FLOAT, weights: WeightsInMemory | None = None, **how: bool
) -> Graphs:
    """A copy, lowered to TensorRT."""
    copy = Graphs(graphs.vision.clone(), graphs.decoder.clone())
    lower_to_tensorrt(copy, **{**HEAD, **how}, stored_type=dtype, quantized=weights)
    return copy


@pytest.fixture(scope="module")
def portable(built_graphs: Graphs) -> Graphs:
    """The same model in standard operators, as the target onnx has it."""
    copy = Graphs(built_graphs.vision.clone(), built_graphs.decoder.clone())
    lower_to_portable(copy, **HEAD, stored_type=FLOAT)
    return copy


def tower_inputs(model: ir.Model) -> Arrays:
    columns = int(next(v for v in model.graph.inputs if v.name == "pixel_values").shape[1])
    rng = np.random.default_rng(3)
    pixels = rng.standard_normal((GRID[0] * GRID[1], columns)).astype(np.float32)
    if "patch_positions" in {v.name for v in model.graph.inputs}:
        return {"pixel_values": pixels, "patch_positions": Patches(pixels, (1, *GRID), 2).positions}
    return {"pixel_values": pixels, "image_grid_thw": np.array([[1, *GRID]])}


def asked(model: ir.Model, states: int) -> Arrays:
    """Four questions of up to six tokens after eleven, from `states` states."""
    inputs = decoder_inputs(model, 4, 6, 11, states)
    return inputs | {"last_index": np.array([5, 3, 4, 5]), "temperature": np.full(4, 1.5, np.float32)}


def distances(
    found: Graphs, expected: Graphs, run: Callable[..., Arrays] = run_onnxruntime
) -> dict[str, float]:
    """Largest differences of features and states, relative to the largest value, and of probabilities."""
    here = run(found.vision, tower_inputs(found.vision))["image_features"]
    there = run_onnxruntime(expected.vision, tower_inputs(expected.vision))["image_features"]
    answers = run(found.decoder, asked(found.decoder, 1))
    exact = run_onnxruntime(expected.decoder, asked(expected.decoder, 4))
    assert set(answers) == set(exact)
    states = [name for name in exact if name.startswith("present")]
    return {
        "features": float(np.abs(here - there).max() / np.abs(there).max()),
        "states": max(float(np.abs(answers[n] - exact[n]).max() / np.abs(exact[n]).max()) for n in states),
        "probs": float(np.abs(answers["probs"] - exact["probs"]).max()),
        "mean": float(np.abs(answers["mean"] - exact["mean"]).max()),
    }


@pytest.mark.parametrize("run", [run_onnxruntime, partial(run_onnxruntime, optimized=True), run_reference])
def test_floats_answer_as_on_the_other_targets(
    built_graphs: Graphs, portable: Graphs, run: Callable[..., Arrays]
) -> None:
    """Four questions run from one state here, and from four copies of it there."""
    found = distances(lowered(built_graphs), portable, run)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("dtype", "most"), [(HALF, 5e-3), (BFLOAT, 4e-2)])
def test_16_bits_stay_near(built_graphs: Graphs, portable: Graphs, dtype: ir.DataType, most: float) -> None:
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
    found = distances(lowered(built_graphs, FLOAT, weights), floats)
    if scheme in ("int8-static", "fp8"):  # inputs are rounded to steps of 0.05, or to three bits
        assert 1e-3 < found["features"] < 0.2 and found["probs"] < 0.2, found
    else:
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_every_value_is_typed_and_no_operator_is_foreign(
    built_graphs: Graphs,
    quantized: Callable[[str], WeightsInMemory],
    dtype: ir.DataType,
    scheme: str | None,
) -> None:
    graphs = lowered(built_graphs, dtype, quantized(scheme) if scheme else None)
    for model in (graphs.vision, graphs.decoder):
        proto = checked_proto(model)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        assert {entry.domain for entry in proto.opset_import} <= {"", "zreward"}
        assert all(entry.version <= 24 for entry in proto.opset_import)
        assert all(node.op_identifier() in model.functions for node in model.graph if node.domain)
    products = [n for m in (graphs.vision, graphs.decoder) for n in m.graph if n.op_type == "MatMul"]
    kept = [
        n for n in products if getattr(n.inputs[1].const_value, "layout", None) and n.inputs[1].dtype is FLOAT
    ]
    if dtype is not FLOAT:
        assert {n.inputs[1].const_value.layout.source.rpartition("linear_attn.")[2] for n in kept} == {
            "in_proj_a.weight",
            "in_proj_b.weight",
        }
    assert Counter(op_types(graphs.decoder))[CAUSAL_CONV_1D] == 3


def test_operators_that_plugins_may_take_over_are_named_like_no_built_in_one(built_graphs: Graphs) -> None:
    """TensorRT's importers match the name of an operator and ignore its domain."""
    built_in = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    graphs = lowered(built_graphs, label_mass=True)
    ours = {name for model in (graphs.vision, graphs.decoder) for _, name, _ in model.functions}
    assert ours == {RUBRIC_EXPECTATION, GATED_DELTA_RULE, CAUSAL_CONV_1D, "LabelMass"}
    assert not ours & (built_in | {"GatedDeltaNet", "LinearAttention", "CausalConvWithState"})
    for node in graphs.decoder.graph:
        if node.op_type in (RUBRIC_EXPECTATION, GATED_DELTA_RULE, CAUSAL_CONV_1D):
            assert node.attributes["plugin_namespace"].as_string() == "zreward"


def test_the_sizes_that_vary_are_those_of_the_profiles(built_graphs: Graphs) -> None:
    graphs = lowered(built_graphs)
    varying = {
        str(size)
        for value in [*graphs.vision.graph.inputs, *graphs.decoder.graph.inputs]
        for size in value.shape
        if not isinstance(size, int)
    }
    assert varying >= {"total_patches", "batch", "sequence_len", "state_batch", "past_sequence_len"}
    assert varying == {"total_patches", "batch", "sequence_len", "state_batch", "past_sequence_len"} | {
        size for size in varying if size.isdecimal()
    }


def test_the_work_is_that_of_the_other_targets(
    built_graphs: Graphs, portable: Graphs, quantized: Callable[[str], WeightsInMemory]
) -> None:
    expected = work_of(portable)
    assert work_of(lowered(built_graphs, HALF)) == expected
    rounded_inputs = work_of(lowered(built_graphs, HALF, quantized("int8-static")))
    assert rounded_inputs.vision.integer_per_row > rounded_inputs.vision.float_per_row
    for graph in ("vision", "decoder"):
        found, plain = getattr(rounded_inputs, graph), getattr(expected, graph)
        assert found.integer_per_row + found.float_per_row == plain.float_per_row
        assert found.attention_per_pair == plain.attention_per_pair


def test_label_mass_is_the_same_in_16_bits(built_graphs: Graphs) -> None:
    masses = []
    for dtype in (FLOAT, HALF):
        model = lowered(built_graphs, dtype, label_mass=True).decoder
        masses.append(run_onnxruntime(model, asked(model, 1), outputs=["label_mass"])["label_mass"])
    assert np.abs(masses[0] - masses[1]).max() < 1e-3
    assert (masses[0] > 0).all()
