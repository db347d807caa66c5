"""The three operators in float64, one token after the other, as their definitions say."""

from __future__ import annotations

import torch
from torch import Tensor


def rubric_expectation(
    hidden: Tensor,
    norm_weight: Tensor,
    rows: Tensor,
    temperature: Tensor,
    bin_values: Tensor,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """probs [B, n], mean [B] and variance [B] of hidden [B, H], norm_weight [H], rows [n, H]."""
    x, norm, weights = hidden.double(), norm_weight.double(), rows.double()
    normed = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm
    probs = torch.softmax(normed @ weights.T / temperature.double()[:, None], dim=-1)
    mean = probs @ bin_values.double()
    variance = (probs * (bin_values.double() - mean[:, None]).square()).sum(-1)
    return probs, mean, variance


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    key_epsilon: float,
) -> tuple[Tensor, Tensor]:
    """output [B, S, Hv, Dv] and state [B, Hv, Dk, Dv] of query and key [B, S, Hk, Dk], value [B, S, Hv, Dv], decay and
    beta [B, S, Hv], state [n, Hv, Dk, Dv]; Gated Delta Networks, arXiv 2412.06464, equation 10."""
    batch, tokens, heads, value_dim = value.shape
    q, k, v, g, b = (tensor.double() for tensor in (query, key, value, decay, beta))
    if key_epsilon > 0:
        q, k = (x / (x.square().sum(-1, keepdim=True) + key_epsilon).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    s = _states_of_rows(state, batch, (heads, key.shape[3], value_dim), value)
    output = torch.zeros_like(v)
    for t in range(tokens):
        s = s * g[:, t].exp()[..., None, None]
        written = b[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], s))
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        output[:, t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], s)
    return output, s


def causal_conv1d(
    input: Tensor, weight: Tensor, state: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """output [B, S, C] and state [B, C, taps − 1] of input [B, S, C], weight [C, taps], state [n, C, taps − 1]."""
    batch, tokens, channels = input.shape
    taps = weight.shape[1]
    past = _states_of_rows(state, batch, (channels, taps - 1), input)
    x = torch.cat([past, input.double().transpose(1, 2)], dim=-1)
    output = sum(x[:, :, j : j + tokens] * weight[:, j].double()[None, :, None] for j in range(taps))
    assert isinstance(output, Tensor)
    if silu:
        output = output / (1 + (-output).exp())
    return output.transpose(1, 2), x[:, :, tokens:]


def _states_of_rows(state: Tensor | None, batch: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """float64 [batch, *shape]: state i of n for the rows i · batch / n and following, zero where there is none."""
    if state is None:
        return torch.zeros(batch, *shape, dtype=torch.float64, device=like.device)
    return state.double().repeat_interleave(batch // len(state), dim=0)
