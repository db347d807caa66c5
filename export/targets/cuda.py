"""ONNX Runtime on a GPU: operators that its CUDA provider has kernels for, in 32 or 16 bits.

DeltaNet layers are GatedDeltaNet with the convolution in front of it and the gated norm behind it, the tower's
attention is Attention, quantized weights are MatMulNBits. The decoder's attention is two products and a softmax, as for
TensorRT: its scores are few beside the tower's, and what mask, past and shared heads select among the provider's
kernels cannot be tried without a GPU. docs/cuda.md describes the graphs.

Products, and what works on single values between them, run in the type that weights are stored in. The residual
stream, norms, rotations, states, and what sets a DeltaNet's decay and write strength stay in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zreward.errors import ExportError
from zreward.export.graph import Graphs
from zreward.export.irtools import add_function
from zreward.export.passes.compute_type import compute_products_in
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.narrow_pointwise import narrow_pointwise
from zreward.export.passes.nbits_products import quantize_products_with_nbits
from zreward.export.passes.packed_delta_net import MICROSOFT, pack_delta_nets
from zreward.export.passes.patch_positions import take_patch_positions
from zreward.export.passes.plain_attention import unfuse_causal_attention
from zreward.export.passes.state_rows import RowLookups
from zreward.export.passes.tower_attention import rotate_and_attend
from zreward.export.targets.shared import simplify
from zreward.quant.source import QuantizedWeights


def lower_to_cuda(
    graphs: Graphs,
    *,
    code_ids: Sequence[int],
    bins: Sequence[float],
    n_positions: int,
    stored_type: ir.DataType,
    label_mass: bool,
    quantized: QuantizedWeights | None = None,
) -> None:
    """Lower both graphs in place; arguments as for `lower_to_cpu`."""
    simplify(graphs, code_ids=code_ids, bins=bins, n_positions=n_positions, label_mass=label_mass)
    take_patch_positions(graphs.vision, without_reduction=True)
    rotate_and_attend(graphs.vision, stored_type)
    repeat = _row_lookups(graphs.decoder)
    stand_in = pack_delta_nets(graphs.decoder, stored_type, repeat)
    unfuse_causal_attention(graphs.decoder, stored_type, repeat)
    for model in (graphs.vision, graphs.decoder):
        if quantized is not None:
            quantize_products_with_nbits(model, quantized, stored_type)
        compute_products_in(model, stored_type)
        narrow_pointwise(model, stored_type)
        remove_dead_outputs(model)
        # The bodies that mobius gave ONNX Runtime's own operators know nothing of channels that come last.
        for name in [name for name in model.functions if name[0] == MICROSOFT]:
            del model.functions[name]
    if stand_in is not None:
        add_function(graphs.decoder, stand_in)


def _row_lookups(decoder: ir.Model) -> RowLookups:
    inputs = {str(value.name): value for value in decoder.graph.inputs}
    states = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
    if "inputs_embeds" not in inputs or not states:
        raise ExportError("cuda: the decoder has no embeddings or no states among its inputs")
    return RowLookups(decoder.graph, inputs["inputs_embeds"], states[0])
