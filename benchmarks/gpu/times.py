"""Times of the kernels on a GPU, beside what the machine could do at best.

    python -m benchmarks.gpu.times build/gpu/libzreward_kernels.so --json times.json

GatedDeltaRule is timed on the prefix of one 1024×1024 image in the 9B shape (1,104 tokens, 32 value heads of 128 over
16 key heads), against the torch reference of transformers and flash-linear-attention's Triton kernels where those are
installed, all on the same tensors. A time is that of a call on the device, between two events with many calls between
them; of these the median and the range over repetitions, and the samples are in the JSON.

Two bounds stand beside it, of rates that are measured here rather than read from a data sheet: its bytes (inputs,
outputs and states once each) at the rate of a large copy, and its multiplications, as many as the chunked form makes
with chunks of 64 tokens, at the rate of a large matrix product: of TensorFloat-32, which the kernels use for every
type, three times for float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.library import Kernels

TOKENS, KEY_HEADS, VALUE_HEADS, HEAD_DIM = 1104, 16, 32, 128
CHUNK = 64
CONV_CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * HEAD_DIM
HIDDEN = 4096

SAMPLES, CALLS, WARM_UP = 15, 20, 10
SCALE, KEY_EPSILON = HEAD_DIM**-0.5, 1e-6


@dataclass
class Time:
    """Milliseconds a call: each sample is the mean of `CALLS` calls in a row. Bounds are None where there is none.

    `difference` is, for a rival, that of its output from ours, over the largest number of ours.
    """

    what: str
    dtype: str
    samples_ms: list[float]
    bytes_bound_ms: float | None = None
    products_bound_ms: float | None = None
    difference: float | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    def line(self) -> str:
        bounds = [bound for bound in (self.bytes_bound_ms, self.products_bound_ms) if bound is not None]
        share = f", bound {max(bounds):.4f} ms, {max(bounds) / self.median_ms:.0%} of it" if bounds else ""
        spread = f"{min(self.samples_ms):.4f} to {max(self.samples_ms):.4f}"
        share += f", differs by {self.difference:.1e}" if self.difference is not None else ""
        return f"{self.what:<34} {self.dtype:<9} {self.median_ms:.4f} ms ({spread}){share}"


def measured(call: Callable[[], object]) -> list[float]:
    """Milliseconds a call, `SAMPLES` times."""
    for _ in range(WARM_UP):
        call()
    samples = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / CALLS)
    return samples


def machine_rates(device: torch.device) -> dict[str, float]:
    """bytes_per_s of a large copy, reads and writes counted; tf32_per_s and bf16_per_s: multiply-adds of a product."""
    n_bytes = 1 << 30
    source, target = (torch.empty(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    rates = {"bytes_per_s": 2 * n_bytes / statistics.median(measured(lambda: target.copy_(source))) * 1e3}
    size = 8192
    torch.backends.cuda.matmul.allow_tf32 = True
    for name, dtype in (("tf32_per_s", torch.float32), ("bf16_per_s", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates[name] = size**3 / statistics.median(measured(lambda a=a, b=b: a @ b)) * 1e3  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    return rates


def chunked_products(tokens: int, value_heads: int, key_dim: int, value_dim: int) -> int:
    """Multiply-adds of the chunked form.

    For each chunk of C tokens of a value head: K Kᵀ and Q Kᵀ (their lower halves), the inverse (C³/6), two products
    with the state, T and A with what is written (lower halves), and the update.
    """
    per_chunk = CHUNK * CHUNK * key_dim + CHUNK**3 // 6 + 2 * CHUNK * key_dim * value_dim
    per_chunk += CHUNK * CHUNK * value_dim + CHUNK * key_dim * value_dim
    return math.ceil(tokens / CHUNK) * value_heads * per_chunk


def rule_inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value, decay, beta, state as views of one projection, as in the graph."""
    torch.manual_seed(0)
    qkv = torch.randn(1, TOKENS, CONV_CHANNELS, device=device).to(dtype)
    key_width = KEY_HEADS * HEAD_DIM
    query, key, value = (
        part.unflatten(-1, (-1, HEAD_DIM))
        for part in qkv.split([key_width, key_width, VALUE_HEADS * HEAD_DIM], -1)
    )
    decay = -torch.rand(1, TOKENS, VALUE_HEADS, device=device)
    beta = torch.rand(1, TOKENS, VALUE_HEADS, device=device)
    state = torch.randn(1, VALUE_HEADS, HEAD_DIM, HEAD_DIM, device=device)
    return query, key, value, decay, beta, state


def time_rule(
    kernels: Kernels, dtype: torch.dtype, device: torch.device, rates: dict[str, float]
) -> list[Time]:
    name = str(dtype).removeprefix("torch.")
    inputs = rule_inputs(dtype, device)
    _query, _key, value, _decay, _beta, state = inputs
    output, new_state = torch.empty(value.shape, dtype=dtype, device=device), torch.empty_like(state)
    workspace = torch.empty(
        kernels.gated_delta_rule_workspace(1, TOKENS, VALUE_HEADS), dtype=torch.uint8, device=device
    )

    def ours() -> None:
        kernels.gated_delta_rule(*inputs, output, new_state, workspace, scale=SCALE, key_epsilon=KEY_EPSILON)

    moved = sum(t.numel() * t.element_size() for t in (*inputs, output, new_state))
    products = chunked_products(TOKENS, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
    times = [
        Time(
            "GatedDeltaRule, zreward",
            name,
            measured(ours),
            moved / rates["bytes_per_s"] * 1e3,
            products * (3 if dtype == torch.float32 else 1) / rates["tf32_per_s"] * 1e3,
        )
    ]
    for rival, call in rivals(dtype, inputs):
        difference = (call().float() - output.float()).abs().max() / output.float().abs().max()
        times.append(Time(f"GatedDeltaRule, {rival}", name, measured(call), difference=difference.item()))
    return times


def rivals(dtype: torch.dtype, inputs: tuple[Tensor, ...]) -> list[tuple[str, Callable[[], Tensor]]]:
    """What else computes the rule here, by name; each gives the output [B, S, Hv, Dv]."""
    query, key, value, decay, beta, state = inputs
    given: dict[str, Any] = {
        "initial_state": state,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    found: list[tuple[str, Callable[[], Tensor]]] = []
    try:
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        repeats = VALUE_HEADS // KEY_HEADS
        wide = [x.repeat_interleave(repeats, dim=2) for x in (query, key)]
        found.append(
            (
                "transformers (torch)",
                lambda: torch_chunk_gated_delta_rule(*wide, value, decay, beta, **given)[0],
            )
        )
    except ImportError:
        print("  transformers (with Qwen3.5) is not installed")
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        if dtype == torch.float32:
            print("  flash-linear-attention takes 16-bit tensors only")
        else:
            repeats = VALUE_HEADS // KEY_HEADS
            wide_fla = [x.repeat_interleave(repeats, dim=2).contiguous() for x in (query, key)]
            gates = decay.to(torch.float32), beta.to(dtype)
            packed = value.contiguous()
            found.append(
                (
                    "flash-linear-attention",
                    lambda: chunk_gated_delta_rule(*wide_fla, packed, *gates, **given)[0],
                )
            )
    except ImportError:
        print("  flash-linear-attention is not installed")
    return found


def time_conv(kernels: Kernels, dtype: torch.dtype, device: torch.device, rates: dict[str, float]) -> Time:
    input = torch.randn(1, TOKENS, CONV_CHANNELS, device=device).to(dtype)
    weight, state = (
        torch.randn(CONV_CHANNELS, 4, device=device),
        torch.randn(1, CONV_CHANNELS, 3, device=device),
    )
    output, new_state = torch.empty_like(input), torch.empty_like(state)
    moved = sum(t.numel() * t.element_size() for t in (input, weight, state, output, new_state))
    samples = measured(lambda: kernels.causal_conv1d(input, weight, state, output, new_state, silu=True))
    name = str(dtype).removeprefix("torch.")
    return Time("CausalConv1d, zreward", name, samples, moved / rates["bytes_per_s"] * 1e3)


def time_head(kernels: Kernels, dtype: torch.dtype, device: torch.device, rates: dict[str, float]) -> Time:
    """Four questions of the 9B shape; launching it takes longer than its work, so the bound is far."""
    hidden = torch.randn(4, HIDDEN, device=device).to(dtype)
    norm, rows = torch.ones(HIDDEN, device=device), torch.randn(9, HIDDEN, device=device) / HIDDEN**0.5
    temperature, bins = torch.ones(4, device=device), torch.arange(1.0, 5.5, 0.5, device=device)
    outputs = [torch.empty(shape, device=device) for shape in ((4, 9), (4,), (4,))]
    moved = sum(t.numel() * t.element_size() for t in (hidden, norm, rows, temperature, bins, *outputs))
    samples = measured(
        lambda: kernels.rubric_expectation(hidden, norm, rows, temperature, bins, *outputs, epsilon=1e-6)
    )
    name = str(dtype).removeprefix("torch.")
    return Time("RubricExpectation, zreward", name, samples, moved / rates["bytes_per_s"] * 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kernels, device = Kernels(arguments.library), torch.device("cuda")
    rates = machine_rates(device)
    print(
        f"{torch.cuda.get_device_name()}: copies at {rates['bytes_per_s'] / 1e12:.2f} TB/s, products at "
        f"{2 * rates['tf32_per_s'] / 1e12:.0f} TFLOP/s (TF32), {2 * rates['bf16_per_s'] / 1e12:.0f} (bfloat16)"
    )
    times: list[Time] = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            times += time_rule(kernels, dtype, device, rates)
            times.append(time_conv(kernels, dtype, device, rates))
            times.append(time_head(kernels, dtype, device, rates))
    for time in times:
        print(time.line())
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": {
                "tokens": TOKENS,
                "key_heads": KEY_HEADS,
                "value_heads": VALUE_HEADS,
                "head_dim": HEAD_DIM,
            },
            "rates": rates,
            "times": [{**asdict(time), "median_ms": time.median_ms} for time in times],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
