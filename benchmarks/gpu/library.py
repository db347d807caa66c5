"""The kernels library (`libzreward_kernels.so`) on torch tensors, by ctypes.

The structures repeat export/plugins/kernels/zreward_kernels.h field by field. Tensors may lie on any device that the
library computes on: CUDA for a real one, the CPU for an emulated one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Element types with their numbers in `enum zreward_type`."""

VERSION = 1

_Fields = list[tuple[str, Any]]


def _fields(kind: Any, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


_int32, _float, _pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class RubricExpectationJob(ctypes.Structure):
    _fields_ = (
        *_fields(_int32, "batch width bins hidden_type norm_type rows_type"),
        ("epsilon", _float),
        *_fields(_pointer, "hidden norm_weight rows temperature bin_values probs mean variance"),
    )


class GatedDeltaRuleJob(ctypes.Structure):
    _fields_ = (
        *_fields(_int32, "batch tokens key_heads value_heads key_dim value_dim states"),
        *_fields(_int32, "type decay_type beta_type"),
        *_fields(_float, "scale key_epsilon"),
        *_fields(ctypes.c_int64, "query_stride key_stride value_stride"),
        *_fields(_pointer, "query key value decay beta state output new_state workspace"),
    )


class CausalConv1dJob(ctypes.Structure):
    _fields_ = (
        *_fields(_int32, "batch tokens channels taps states type weight_type state_type silu"),
        *_fields(_pointer, "input weight state output new_state"),
    )


class KernelError(RuntimeError):
    """The library refused a call; the message is its own."""


class Kernels:
    """The three operators. Outputs are given by the caller; nothing waits for the device."""

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: it cannot be loaded.
            KernelError: its structures have another version than this module.
        """
        self.library = ctypes.CDLL(str(path))
        self.library.zreward_last_error.restype = ctypes.c_char_p
        self.library.zreward_gated_delta_rule_workspace.restype = ctypes.c_size_t
        version = self.library.zreward_kernels_version()
        if version != VERSION:
            raise KernelError(f"{path} has version {version} of the interface, expected {VERSION}")

    def rubric_expectation(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        rows: Tensor,
        temperature: Tensor,
        bin_values: Tensor,
        probs: Tensor,
        mean: Tensor,
        variance: Tensor,
        *,
        epsilon: float,
    ) -> None:
        """hidden [B, H], norm_weight [H], rows [n, H] of any type; the others float32: [B], [n], [B, n], [B], [B]."""
        job = RubricExpectationJob(
            *hidden.shape, len(rows), *(TYPES[t.dtype] for t in (hidden, norm_weight, rows)), epsilon
        )
        _point(job, locals())
        self._call("zreward_rubric_expectation", job, hidden)

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        state: Tensor | None,
        output: Tensor,
        new_state: Tensor | None,
        workspace: Tensor,
        *,
        scale: float,
        key_epsilon: float,
    ) -> None:
        """query and key [B, S, Hk, Dk], value [B, S, Hv, Dv] of one type, tokens at any stride; decay and beta
        [B, S, Hv]; state float32 [n, Hv, Dk, Dv] or None; output as value, new_state float32 [B, Hv, Dk, Dv]."""
        batch, tokens, key_heads, key_dim = key.shape
        job = GatedDeltaRuleJob(
            *(batch, tokens, key_heads, value.shape[2], key_dim, value.shape[3]),
            0 if state is None else len(state),
            *(TYPES[t.dtype] for t in (value, decay, beta)),
            scale,
            key_epsilon,
            *(_token_stride(t) for t in (query, key, value)),
        )
        _point(job, locals())
        self._call("zreward_gated_delta_rule", job, value)

    def gated_delta_rule_workspace(self, batch: int, tokens: int, value_heads: int) -> int:
        """Bytes of workspace."""
        return int(self.library.zreward_gated_delta_rule_workspace(batch, tokens, value_heads))

    def causal_conv1d(
        self,
        input: Tensor,
        weight: Tensor,
        state: Tensor | None,
        output: Tensor,
        new_state: Tensor | None,
        *,
        silu: bool,
    ) -> None:
        """input and output [B, S, C], weight [C, taps], state [n, C, taps − 1] or None, new_state [B, C, taps − 1]."""
        of_state = next((t for t in (state, new_state) if t is not None), input)
        job = CausalConv1dJob(
            *input.shape,
            weight.shape[1],
            0 if state is None else len(state),
            *(TYPES[t.dtype] for t in (input, weight, of_state)),
            silu,
        )
        _point(job, locals())
        self._call("zreward_causal_conv1d", job, input)

    def _call(self, function: str, job: ctypes.Structure, on: Tensor) -> None:
        stream = torch.cuda.current_stream(on.device).cuda_stream if on.is_cuda else None
        status = getattr(self.library, function)(ctypes.byref(job), ctypes.c_void_p(stream))
        if status:
            raise KernelError(self.library.zreward_last_error().decode())


def _token_stride(tensor: Tensor) -> int:
    """Elements from one token of [B, S, H, D] to the next; torch leaves the stride of a single token undefined."""
    return tensor.stride(0 if tensor.shape[1] == 1 else 1)


def _point(job: ctypes.Structure, tensors: Mapping[str, Any]) -> None:
    """Set each pointer of `job` to the tensor of its name; None is null."""
    for name, kind in job._fields_:  # type: ignore[misc]
        if kind is _pointer and tensors[name] is not None:
            setattr(job, name, tensors[name].data_ptr())
