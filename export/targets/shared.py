"""The passes that every target starts with: the score head, one image, weights as products read them, and no more
positions than the head reads."""

from __future__ import annotations

from collections.abc import Sequence

from zreward.export.graph import Graphs
from zreward.export.passes.dead_outputs import remove_dead_outputs
from zreward.export.passes.delta_norm import add_delta_norm_epsilon
from zreward.export.passes.last_position import read_last_positions
from zreward.export.passes.patch_embedding import lower_patch_embedding
from zreward.export.passes.position_table import interpolate_positions
from zreward.export.passes.rotary_table import trim_rotary_tables
from zreward.export.passes.score_head import fuse_score_head
from zreward.export.passes.single_image import specialize_single_image
from zreward.export.passes.weight_layout import transpose_weights


def simplify(
    graphs: Graphs, *, code_ids: Sequence[int], bins: Sequence[float], n_positions: int, label_mass: bool
) -> None:
    """Bring both graphs, fresh from `graphs_from_checkpoint`, to what all targets have in common.

    Args:
        graphs: changed in place.
        code_ids: the head's rows, in bin order.
        bins: their score values.
        n_positions: rotary positions that a sequence of the contract can reach.
        label_mass: also output the share of probability that the codes hold.
    """
    fuse_score_head(graphs.decoder, code_ids, bins, label_mass=label_mass)
    add_delta_norm_epsilon(graphs.decoder)
    trim_rotary_tables(graphs.decoder, n_positions)
    specialize_single_image(graphs.vision)
    interpolate_positions(graphs.vision)
    lower_patch_embedding(graphs.vision)
    for model in (graphs.vision, graphs.decoder):
        transpose_weights(model)
        remove_dead_outputs(model)
    read_last_positions(graphs.decoder)
