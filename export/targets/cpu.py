"""ONNX Runtime on the CPU: fused norms and DeltaNet operators of com.microsoft, weights as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from zreward.export.graph import Graphs
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.delta_norm import add_delta_norm_epsilon
from zreward.export.passes.patch_embedding import lower_patch_embedding
from zreward.export.passes.rotary_table import trim_rotary_tables
from zreward.export.passes.score_head import fuse_score_head
from zreward.export.passes.single_image import specialize_single_image
from zreward.export.passes.weight_layout import transpose_weights
from zreward.export.passes.weight_storage import store_weights


def lower_to_cpu(
    graphs: Graphs,
    *,
    code_ids: Sequence[int],
    bins: Sequence[float],
    n_positions: int,
    stored_type: ir.DataType,
    label_mass: bool,
) -> None:
    """Lower both graphs in place.

    Args:
        graphs: fresh from `graphs_from_checkpoint`.
        code_ids: the head's rows, in bin order.
        bins: their score values.
        n_positions: rotary positions that a sequence of the contract can reach.
        stored_type: type of the stored weight matrices.
        label_mass: also output the share of probability that the codes hold.
    """
    fuse_score_head(graphs.decoder, code_ids, bins, label_mass=label_mass)
    add_delta_norm_epsilon(graphs.decoder)
    trim_rotary_tables(graphs.decoder, n_positions)
    specialize_single_image(graphs.vision)
    lower_patch_embedding(graphs.vision)
    for model in (graphs.vision, graphs.decoder):
        transpose_weights(model)
        remove_dead_outputs(model)
        store_weights(model, stored_type)
