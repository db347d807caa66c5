"""transformers' cache as a part of a computation: with a gradient, chosen by row, and put together from parts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer


class StatesWithGradient(DynamicCache):
    """transformers' cache with DeltaNet states that are replaced, not overwritten: a backward pass still needs them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [
            _ReplacedStates() if type(layer) is LinearAttentionLayer else layer for layer in self.layers
        ]

    def of_rows(self, rows_b: Tensor) -> StatesWithGradient:
        """A cache of its own with these rows of this one, any of them several times."""
        chosen = copy.copy(self)
        chosen.layers = [copy.copy(layer) for layer in self.layers]
        for layer in chosen.layers:
            if isinstance(layer, LinearAttentionLayer):
                layer.conv_states = dict(layer.conv_states)
                layer.recurrent_states = dict(layer.recurrent_states)
        chosen.reorder_cache(rows_b)  # type: ignore[arg-type]  # transformers annotates with a legacy class
        return chosen

    @staticmethod
    def joined(parts: Sequence[StatesWithGradient]) -> StatesWithGradient:
        """The rows of several caches in one; keys and values of the shorter ones are padded on the left with 0."""
        whole = parts[0].of_rows(torch.arange(_rows(parts[0])))
        length = max(part.get_seq_length() for part in parts)
        for place, layer in enumerate(whole.layers):
            same: list[Any] = [part.layers[place] for part in parts]
            if isinstance(layer, LinearAttentionLayer):
                for states in ("conv_states", "recurrent_states"):
                    joined = {
                        k: torch.cat([getattr(one, states)[k] for one in same])
                        for k in getattr(layer, states)
                    }
                    setattr(layer, states, joined)
            else:
                for states in ("keys", "values"):
                    padded = [_padded(getattr(one, states), length) for one in same]
                    setattr(layer, states, torch.cat(padded))
        return whole


def _padded(states_bhtd: Tensor, length: int) -> Tensor:
    return F.pad(states_bhtd, (0, 0, length - states_bhtd.shape[2], 0))


def _rows(cache: DynamicCache) -> int:
    layer: Any = cache.layers[0]
    states: Any = layer.conv_states[0] if isinstance(layer, LinearAttentionLayer) else layer.keys
    return len(states)


class _ReplacedStates(LinearAttentionLayer):
    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **options: Any
    ) -> Tensor:
        before = self.conv_states[state_idx]
        self.conv_states[state_idx] = None if before is None else before.clone()
        full: Tensor = super().update_conv_state(conv_states, state_idx, conv_kernel_size, **options)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states
