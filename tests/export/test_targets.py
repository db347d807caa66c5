"""Targets lower quantized checkpoints to graphs that answer like the dequantized model."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir import tape

from tests.support.graphs import normal, op_types, run_onnxruntime
from tests.support.quantized import WeightsInMemory, quantized_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.export.graph import Graphs, graphs_from_checkpoint
from zreward.export.passes.quantized_products import dequantized_weights
from zreward.export.passes.state_rows import KEEP_STATES
from zreward.export.targets.cpu import lower_to_cpu
from zreward.export.targets.portable import lower_to_portable
from zreward.export.weights import CheckpointTensor
from zreward.quant.scheme import KEPT, Scheme, resolve

Arrays = dict[str, NDArray[Any]]

SCHEME = "int4-g16,model.visual.*=int8-weight-g16-asym,*.o_proj=int8-weight-g32,*.down_proj=int4-g32-asym"
HEAD = {
    "code_ids": list(range(20, 29)),
    "bins": [1 + i / 2 for i in range(9)],
    "n_positions": 512,
    "label_mass": False,
}
EXACT = {"session__qdq_matmulnbits_accuracy_level": "0"}


def lowered(
    path: Path, scheme: str, lower: Callable[..., None], *, dtype: ir.DataType = ir.DataType.FLOAT, **how: Any
) -> tuple[Graphs, Graphs, WeightsInMemory]:
    """Graphs of the quantized checkpoint, lowered; the same as floats; and the quantized weights."""
    floats = Checkpoint.open(path)
    shapes = {name: info.shape for name, info in floats.tensors.items()}
    checkpoint, weights = quantized_checkpoint(floats, resolve(Scheme.parse(scheme), shapes).formats)
    graphs = graphs_from_checkpoint(checkpoint)
    reference = Graphs(graphs.vision.clone(), graphs.decoder.clone())
    lower(graphs, **HEAD, stored_type=dtype, quantized=weights, **how)
    lower_to_cpu(reference, **HEAD, stored_type=ir.DataType.FLOAT)
    return graphs, reference, weights


def vision_inputs() -> Arrays:
    pixels = normal(np.random.default_rng(1), 24, 384)
    return {"pixel_values": pixels, "image_grid_thw": np.array([[1, 4, 6]])}


def decoder_inputs(model: ir.Model) -> Arrays:
    """Two rows of five tokens with no past."""
    rng, rows, tokens = np.random.default_rng(2), 2, 5
    inputs: Arrays = {
        "inputs_embeds": normal(rng, rows, tokens, 64),
        "attention_mask": np.ones((rows, tokens), dtype=np.int64),
        "position_ids": np.tile(np.arange(tokens), (3, rows, 1)),
        "last_index": np.array([4, 2]),
        "temperature": np.ones(rows, dtype=np.float32),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            sizes = [d if isinstance(d, int) else rows if i == 0 else 0 for i, d in enumerate(value.shape)]
            inputs[str(value.name)] = np.zeros(sizes, dtype=np.float32)
        elif value.name == KEEP_STATES:
            inputs[KEEP_STATES] = np.array(1)
    return inputs


def largest_difference(graphs: Graphs, reference: Graphs, **config: str) -> dict[str, float]:
    """Of the image features, relative to their largest, and of the bins' probabilities."""
    found = run_onnxruntime(graphs.vision, vision_inputs(), optimized=True, **config)["image_features"]
    expected = run_onnxruntime(reference.vision, vision_inputs())["image_features"]
    probs = run_onnxruntime(graphs.decoder, decoder_inputs(graphs.decoder), optimized=True, **config)["probs"]
    exact = run_onnxruntime(reference.decoder, decoder_inputs(reference.decoder))["probs"]
    return {
        "features": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "probs": float(np.abs(probs - exact).max()),
    }


def test_codes_without_rounded_activations_answer_like_the_dequantized_model(checkpoint_path: Path) -> None:
    graphs, reference, weights = lowered(checkpoint_path, SCHEME, lower_to_cpu, accuracy_level=0)
    for model in (graphs.vision, graphs.decoder):
        assert dequantized_weights(model, weights) == []
        assert "MatMulNBits" in op_types(model)
    differences = largest_difference(graphs, reference)
    assert differences["features"] < 1e-5 and differences["probs"] < 1e-5


def test_the_portable_target_answers_like_the_dequantized_model(checkpoint_path: Path) -> None:
    graphs, reference, weights = lowered(checkpoint_path, SCHEME, lower_to_portable)
    for model in (graphs.vision, graphs.decoder):
        assert dequantized_weights(model, weights) == []
        foreign = {node.op_identifier() for node in model.graph if node.domain}
        assert foreign <= set(model.functions)  # whatever is not standard has a body that is
    differences = largest_difference(graphs, reference, **EXACT)
    assert differences["features"] < 1e-5 and differences["probs"] < 1e-5


def round_rows(model: ir.Model, weights: WeightsInMemory) -> None:
    """Round the input of each quantized product of a float graph to 8 bits a row, in float arithmetic."""
    axis = ir.Value(name="test.axis", const_value=ir.tensor(np.array([-1]), name="test.axis"))
    steps = ir.Value(name="test.steps", const_value=ir.tensor(np.float32(127), name="test.steps"))
    for value in (axis, steps):
        model.graph.register_initializer(value)
    for node in list(model.graph):
        tensor = node.inputs[1].const_value if node.op_type == "MatMul" else None
        if isinstance(tensor, CheckpointTensor) and tensor.layout.source in weights.formats:
            builder = tape.Tape()
            peak = builder.op("ReduceMax", [builder.op("Abs", [node.inputs[0]]), axis])
            scale = builder.op("Div", [peak, steps])
            codes = builder.op("Round", [builder.op("Div", [node.inputs[0], scale])])
            node.replace_input_with(0, builder.op("Mul", [codes, scale]))
            model.graph.insert_before(node, builder.nodes)


def test_int8_rows_answer_like_the_float_model_with_rounded_rows(checkpoint_path: Path) -> None:
    """Equal up to the codes that a last bit turns over; against unrounded rows the answers move more."""
    graphs, reference, weights = lowered(checkpoint_path, "int8", lower_to_cpu)
    unrounded = largest_difference(graphs, reference)
    round_rows(reference.vision, weights)
    round_rows(reference.decoder, weights)
    differences = largest_difference(graphs, reference)
    assert differences["features"] < 5e-3 < unrounded["features"]
    assert differences["probs"] < 5e-3 < unrounded["probs"]


def test_activations_rounded_by_block_stay_close(checkpoint_path: Path) -> None:
    graphs, reference, _ = lowered(checkpoint_path, SCHEME, lower_to_cpu)
    differences = largest_difference(graphs, reference)
    assert 1e-4 < differences["features"] < 3e-2
    assert 1e-5 < differences["probs"] < 3e-2


@pytest.mark.parametrize("lower", [lower_to_cpu, lower_to_portable])
def test_what_stays_high_precision_stays_as_it_was(checkpoint_path: Path, lower: Callable[..., None]) -> None:
    graphs, reference, weights = lowered(checkpoint_path, SCHEME, lower)
    kept = {}
    for model in (graphs.vision, graphs.decoder):
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, CheckpointTensor):
                kept[value.name] = value.const_value
    sources = {tensor.layout.source for tensor in kept.values()}
    assert sources == set(Checkpoint.open(checkpoint_path).tensors) - set(weights.formats)
    for part in ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "norm.weight", "patch_embed.proj"):
        assert any(part in source for source in sources)
    assert all(any(fnmatchcase(source, rule.pattern) for rule in KEPT) for source in sources)
    for model in (reference.vision, reference.decoder):
        for value in model.graph.initializers.values():
            if value.name in kept:
                np.testing.assert_array_equal(kept[value.name].numpy(), value.const_value.numpy())


def test_float_matrices_are_stored_in_16_bits_beside_quantized_ones(checkpoint_path: Path) -> None:
    graphs, reference, _ = lowered(checkpoint_path, SCHEME, lower_to_cpu, dtype=ir.DataType.FLOAT16)
    stored = [
        value.const_value
        for value in graphs.vision.graph.initializers.values()
        if isinstance(value.const_value, CheckpointTensor) and value.dtype is ir.DataType.FLOAT16
    ]
    assert [tensor.layout.source for tensor in stored] == ["model.visual.patch_embed.proj.weight"]
    assert largest_difference(graphs, reference)["features"] < 3e-2
