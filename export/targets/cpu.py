"""ONNX Runtime on the CPU: fused layers with kernels of our own, operators of com.microsoft in their bodies."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zreward.export.graph import Graphs
from zreward.export.passes.attention import fuse_causal_attention, fuse_rotary_attention
from zreward.export.passes.delta_net import fuse_delta_nets
from zreward.export.passes.quantized_linear import ROUNDING_LEVEL
from zreward.export.passes.quantized_products import quantize_products_for_onnxruntime
from zreward.export.passes.skip_norm import fuse_skip_norms
from zreward.export.passes.weight_storage import store_weights
from zreward.export.targets.shared import simplify
from zreward.export.weights import CheckpointTensor
from zreward.quant.source import QuantizedWeights
from zreward.quant.tensor import WeightFormat


def lower_to_cpu(
    graphs: Graphs,
    *,
    code_ids: Sequence[int],
    bins: Sequence[float],
    n_positions: int,
    stored_type: ir.DataType,
    label_mass: bool,
    quantized: QuantizedWeights | None = None,
    accuracy_level: int = ROUNDING_LEVEL,
) -> None:
    """Lower both graphs in place.

    Args:
        graphs: fresh from `graphs_from_checkpoint`.
        code_ids: the head's rows, in bin order.
        bins: their score values.
        n_positions: rotary positions that a sequence of the contract can reach.
        stored_type: type of the stored float matrices.
        label_mass: also output the share of probability that the codes hold.
        quantized: matrices that are multiplied as codes; None: all are floats.
        accuracy_level: of products with scales for blocks: 4 rounds activations to 8 bits per block, 0 keeps them.
    """
    simplify(graphs, code_ids=code_ids, bins=bins, n_positions=n_positions, label_mass=label_mass)
    fuse_delta_nets(graphs.decoder)
    fuse_causal_attention(graphs.decoder, bfloat16=_rounds_inputs(graphs.decoder, quantized, accuracy_level))
    fuse_rotary_attention(graphs.vision, bfloat16=_rounds_inputs(graphs.vision, quantized, accuracy_level))
    for model in (graphs.vision, graphs.decoder):
        fuse_skip_norms(model)
        if quantized is not None:
            quantize_products_for_onnxruntime(model, quantized, accuracy_level=accuracy_level)
        store_weights(model, stored_type)


def _rounds_inputs(model: ir.Model, quantized: QuantizedWeights | None, accuracy_level: int) -> bool:
    """Whether every quantized layer rounds its inputs to 8 bits: then attention may round to bfloat16."""
    if quantized is None:
        return False
    tensors = (value.const_value for value in model.graph.initializers.values())
    sources = {t.layout.source for t in tensors if isinstance(t, CheckpointTensor)}
    formats = [quantized.formats[name] for name in sources if name in quantized.formats]
    return bool(formats) and all(
        isinstance(f, WeightFormat) and (f.activations == "int8" or accuracy_level == ROUNDING_LEVEL)
        for f in formats
    )
