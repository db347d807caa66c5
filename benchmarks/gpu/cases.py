"""Random calls of the kernels, each compared with its reference.

What a kernel may not do shows here: its outputs begin as NaN with guards around them, inputs have NaN between their
rows, and the workspace is NaN before every call. An error is the largest difference over the largest expected number
of a tensor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu import references
from benchmarks.gpu.library import TYPES, Kernels

LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Largest relative error by the type of the inputs."""

BINS = torch.arange(1.0, 5.5, 0.5)

_GUARD = 64
_SENTINEL = 12345.0


@dataclass
class Outcome:
    """One call: its sizes, and the relative error of each output."""

    operator: str
    dtype: torch.dtype
    sizes: dict[str, int | float | str]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def passed(self) -> bool:
        return self.worst <= LIMITS[self.dtype]


class Poisoned:
    """An output of NaN with guards on both sides."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        count = math.prod(shape)
        self._all = torch.full((count + 2 * _GUARD,), _SENTINEL, dtype=dtype, device=device)
        self.tensor = self._all[_GUARD : _GUARD + count].view(shape)
        self.tensor.fill_(math.nan)

    def error(self, expected: Tensor) -> float:
        """Relative error against a float64 tensor; infinite where something is NaN or a guard was written to."""
        guards = torch.cat([self._all[:_GUARD], self._all[-_GUARD:]])
        if (guards != torch.tensor(_SENTINEL, dtype=guards.dtype)).any():
            return math.inf
        return relative_error(self.tensor, expected)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found − expected| / max |expected|, infinite where `found` is not finite."""
    if expected.numel() == 0:
        return 0.0
    difference = (found.double() - expected).abs().max().item()
    largest = expected.abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / largest if largest > 0 else difference


def normal(rng: random.Random, *shape: int, device: torch.device) -> Tensor:
    """float32 normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    return torch.randn(*shape, generator=generator).to(device)


def _apart(tensor: Tensor, gap: int) -> Tensor:
    """The tensor [B, S, H, D] with `gap` elements of NaN after each token."""
    batch, tokens, heads, dim = tensor.shape
    wide = torch.full((batch, tokens, heads * dim + gap), math.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., : heads * dim] = tensor.flatten(2)
    return wide[..., : heads * dim].unflatten(-1, (heads, dim))


def _number_of_states(rng: random.Random, batch: int) -> int:
    """0 for no past, or a divisor of the batch."""
    return rng.choice([0, *(n for n in range(1, batch + 1) if batch % n == 0)])


TOKENS = (1, 2, 7, 14, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 127, 128, 129, 150)


def _rule_sizes(rng: random.Random, most_work: float) -> tuple[int, ...]:
    """batch, tokens, key heads, value heads, key and value dim."""
    while True:
        batch = rng.choice([1, 1, 2, 4])
        tokens = rng.choice([1, rng.choice(TOKENS), rng.choice(TOKENS), rng.randrange(1, 600)])
        key_heads, group = rng.choice([(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1)])
        key_dim, value_dim = (rng.choice([32, 64, 128, 256, 8 * rng.randrange(4, 33)]) for _ in range(2))
        heads = key_heads * group
        if (
            batch * heads * math.ceil(tokens / 64) * math.ceil(key_dim / 64) * math.ceil(value_dim / 32)
            <= most_work
        ):
            return batch, tokens, key_heads, heads, key_dim, value_dim


def gated_delta_rule(
    kernels: Kernels,
    rng: random.Random,
    dtype: torch.dtype,
    device: torch.device,
    most_work: float,
    *,
    sizes: tuple[int, ...] | None = None,
    n_states: int | None = None,
) -> Outcome:
    """One call of random sizes; most end in the middle of a chunk, one in four has a single token.

    `sizes` sets batch, tokens, key heads, value heads, key and value dim.
    """
    batch, tokens, key_heads, heads, key_dim, value_dim = sizes or _rule_sizes(rng, most_work)
    if n_states is None:
        n_states = _number_of_states(rng, batch)
    gate_types = [rng.choice([torch.float32, dtype]) for _ in range(2)]
    normalized = rng.random() < 0.5
    speed = rng.choice([0.001, 0.1, 1.0, 30.0])

    def drawn(*shape: int) -> Tensor:
        return normal(rng, *shape, device=device)

    query, key = (drawn(batch, tokens, key_heads, key_dim) for _ in range(2))
    if normalized:
        query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
    value = drawn(batch, tokens, heads, value_dim)
    gap = rng.choice([0, 8])
    query, key, value = (_apart(x.to(dtype), gap) for x in (query, key, value))
    decay = (-speed * torch.nn.functional.softplus(drawn(batch, tokens, heads))).to(gate_types[0])
    beta = torch.sigmoid(2 * drawn(batch, tokens, heads)).to(gate_types[1])
    state = drawn(n_states, heads, key_dim, value_dim) if n_states else None
    attributes = {"scale": key_dim**-0.5, "key_epsilon": 0.0 if normalized else 1e-6}

    output = Poisoned((batch, tokens, heads, value_dim), dtype, device)
    new_state = Poisoned((batch, heads, key_dim, value_dim), torch.float32, device)
    n_bytes = kernels.gated_delta_rule_workspace(batch, tokens, heads)
    workspace = Poisoned((n_bytes // 4,), torch.float32, device)
    inputs = (query, key, value, decay, beta, state)
    kernels.gated_delta_rule(*inputs, output.tensor, new_state.tensor, workspace.tensor, **attributes)
    expected_output, expected_state = references.gated_delta_rule(*inputs, **attributes)
    shown = {
        "batch": batch,
        "states": n_states,
        "tokens": tokens,
        "key_heads": key_heads,
        "value_heads": heads,
    }
    return Outcome(
        "GatedDeltaRule",
        dtype,
        {**shown, "key_dim": key_dim, "value_dim": value_dim, "speed": speed, **attributes},
        {"output": output.error(expected_output), "state": new_state.error(expected_state)},
    )


def causal_conv1d(
    kernels: Kernels, rng: random.Random, dtype: torch.dtype, device: torch.device, most_work: float
) -> Outcome:
    """One call of random sizes, from one token on."""
    batch = rng.choice([1, 1, 2, 4])
    tokens = rng.choice([1, 2, 3, 4, 15, 16, 17, 33, rng.randrange(1, 600)])
    channels, taps = 8 * rng.randrange(1, 160), rng.choice([2, 3, 4, 4])
    n_states, silu = _number_of_states(rng, batch), rng.random() < 0.8
    weight_type, state_type = (rng.choice([torch.float32, dtype]) for _ in range(2))
    input = normal(rng, batch, tokens, channels, device=device).to(dtype)
    weight = normal(rng, channels, taps, device=device).to(weight_type)
    state = normal(rng, n_states, channels, taps - 1, device=device).to(state_type) if n_states else None
    output = Poisoned((batch, tokens, channels), dtype, device)
    new_state = Poisoned((batch, channels, taps - 1), state_type, device)
    kernels.causal_conv1d(input, weight, state, output.tensor, new_state.tensor, silu=silu)
    expected_output, expected_state = references.causal_conv1d(input, weight, state, silu=silu)
    sizes = {
        "batch": batch,
        "states": n_states,
        "tokens": tokens,
        "channels": channels,
        "taps": taps,
        "silu": int(silu),
    }
    # a state is a copy: it may differ by the rounding to its own type, and by nothing in float32
    return Outcome(
        "CausalConv1d",
        dtype,
        dict(sizes),
        {"output": output.error(expected_output), "state": new_state.error(expected_state)},
    )


def rubric_expectation(
    kernels: Kernels, rng: random.Random, dtype: torch.dtype, device: torch.device, most_work: float
) -> Outcome:
    """One call of random sizes; some widths are no multiples of anything, some heads have other than nine bins."""
    batch = rng.choice([1, 2, 4, 5, 32])
    width = rng.choice([192, 1024, 4096, rng.randrange(1, 600)])
    n_bins = rng.choice([9, 9, 9, 2, 5, rng.randrange(1, 100)])
    norm_type, rows_type = (rng.choice([torch.float32, dtype]) for _ in range(2))
    hidden = (normal(rng, batch, width, device=device) * rng.choice([1e-3, 1, 30])).to(dtype)
    norm_weight = (1 + 0.1 * normal(rng, width, device=device)).to(norm_type)
    rows = (normal(rng, n_bins, width, device=device) * 2 / math.sqrt(width)).to(rows_type)
    temperature = 0.3 + normal(rng, batch, device=device).abs()
    bins = (BINS if n_bins == 9 else torch.linspace(1, 5, n_bins)).to(device)
    found = [Poisoned(shape, torch.float32, device) for shape in ((batch, n_bins), (batch,), (batch,))]
    inputs = (hidden, norm_weight, rows, temperature, bins)
    kernels.rubric_expectation(*inputs, *(output.tensor for output in found), epsilon=1e-6)
    expected = references.rubric_expectation(*inputs, epsilon=1e-6)
    errors = {
        name: output.error(tensor)
        for name, output, tensor in zip(("probs", "mean", "variance"), found, expected, strict=True)
    }
    return Outcome("RubricExpectation", dtype, {"batch": batch, "width": width, "bins": n_bins}, errors)


Case = Callable[[Kernels, random.Random, torch.dtype, torch.device, float], Outcome]
OPERATORS: Mapping[str, Case] = {
    "GatedDeltaRule": gated_delta_rule,
    "CausalConv1d": causal_conv1d,
    "RubricExpectation": rubric_expectation,
}


def run_cases(
    kernels: Kernels,
    operator: str,
    count: int,
    device: torch.device,
    seed: int = 0,
    most_work: float = math.inf,
) -> list[Outcome]:
    """`count` random calls of an operator, the types in turn.

    Args:
        most_work: bounds a call of the rule, in pieces of 64 tokens, 64 key and 32 value columns; an emulated GPU
            takes about 10 ms for one.
    """
    rng = random.Random(seed)
    types = list(TYPES)
    return [OPERATORS[operator](kernels, rng, types[i % len(types)], device, most_work) for i in range(count)]
