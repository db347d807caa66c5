"""Rotary tables cut to the positions that the contract can reach.

mobius tabulates cosines and sines for the model's whole context, 67 MB for 262,144 positions of a 0.8B
model. A score reads a prompt of bounded length and one image of bounded size.
"""

from __future__ import annotations

import onnx_ir as ir

from zreward.errors import ExportError


def trim_rotary_tables(model: ir.Model, n_positions: int) -> int:
    """Keep the first `n_positions` rows of every `cos_cache` and `sin_cache`."""
    changes = 0
    for name, value in model.graph.initializers.items():
        if not name.endswith((".cos_cache", ".sin_cache")):
            continue
        assert value.const_value is not None  # mobius computes the tables while building
        table = value.const_value.numpy()
        if table.shape[0] < n_positions:
            raise ExportError(
                f"the contract allows {n_positions} positions, but the model has only {table.shape[0]} "
                "(max_position_embeddings); lower max_prompt_tokens or image.max_pixels in the contract"
            )
        value.const_value = ir.tensor(table[:n_positions].copy(), name=name)
        value.shape = ir.Shape((n_positions, *table.shape[1:]))
        changes += 1
    return changes
