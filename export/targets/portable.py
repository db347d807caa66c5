"""Any runtime of ONNX opset 24: quantized weights in standard operators, fused operators with their bodies.

The operators of com.microsoft and zreward that remain are local functions of the model, whose bodies are
standard; a runtime that does not know them runs those.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zreward.export.graph import Graphs
from zreward.export.passes.quantized_products import quantize_products_portably
from zreward.export.passes.weight_storage import store_weights
from zreward.export.targets.shared import simplify
from zreward.quant.source import QuantizedWeights


def lower_to_portable(
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
    for model in (graphs.vision, graphs.decoder):
        if quantized is not None:
            quantize_products_portably(model, quantized)
        store_weights(model, stored_type)
