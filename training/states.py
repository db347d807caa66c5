"""transformers' cache as a part of a computation that has a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer


class StatesWithGradient(DynamicCache):
    """transformers' cache with DeltaNet states that are replaced, not overwritten: a backward pass still needs them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [
            _ReplacedStates() if type(layer) is LinearAttentionLayer else layer for layer in self.layers
        ]


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
