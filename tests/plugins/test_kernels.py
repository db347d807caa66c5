"""The CUDA kernels on an emulated GPU against float64: their arithmetic, their indices and their barriers.

The emulator runs the same sources on a CPU, one thread after another. It shows nothing about speed, nor that a GPU's
compiler and memory do what it does; benchmarks/gpu/run.sh runs the same cases on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import cases, check, times
from benchmarks.gpu.library import KernelError, Kernels

CPU = torch.device("cpu")

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error; the emulated kernels reach 4e-6, 9e-4 and 4e-3."""

MOST_WORK = 60


@pytest.fixture(scope="module")
def kernels(emulated: Path) -> Kernels:
    return Kernels(emulated / "libkernels.so")


@pytest.mark.parametrize(
    ("operator", "count"), [("RubricExpectation", 90), ("CausalConv1d", 90), ("GatedDeltaRule", 45)]
)
def test_random_calls_match_float64(kernels: Kernels, operator: str, count: int) -> None:
    before = kernels.library.emulator_waits()
    outcomes = cases.run_cases(kernels, operator, count, CPU, seed=3, most_work=MOST_WORK)
    for outcome in outcomes:
        assert outcome.worst <= LIMITS[outcome.dtype], outcome
    assert len(outcomes) == count
    if operator != "CausalConv1d":  # whose threads never wait for each other
        assert kernels.library.emulator_waits() > before


@pytest.mark.parametrize(
    ("tokens", "key_dim", "value_dim", "states"),
    [(1, 128, 128, 1), (64, 32, 40, 0), (65, 256, 32, 4), (130, 64, 64, 2)],
    ids=["one token", "one chunk, no past", "a chunk and one token", "shared states"],
)
@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16", "bf16"])
def test_delta_rule_at_its_edges(
    kernels: Kernels, tokens: int, key_dim: int, value_dim: int, states: int, dtype: torch.dtype
) -> None:
    rng = random.Random(tokens)
    batch = 4 if states > 1 else 1
    outcome = cases.gated_delta_rule(
        kernels, rng, dtype, CPU, math.inf, sizes=(batch, tokens, 1, 2, key_dim, value_dim), n_states=states
    )
    assert outcome.worst <= LIMITS[dtype], outcome


def test_a_state_of_a_million_does_not_disturb_small_numbers_of_others(kernels: Kernels) -> None:
    """Rows of a batch share nothing but the launch."""
    rng = random.Random(5)
    alone = _rule_outputs(kernels, rng, scale_of_last=1.0)
    beside = _rule_outputs(kernels, random.Random(5), scale_of_last=1e6)
    for a, b in zip(alone, beside, strict=True):
        assert torch.equal(a[0], b[0])


def _rule_outputs(
    kernels: Kernels, rng: random.Random, *, scale_of_last: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and new state of two rows; the second one's state is scaled."""
    query, key, value = (cases.normal(rng, 2, 70, 1, dim, device=CPU) for dim in (32, 32, 32))
    decay = -cases.normal(rng, 2, 70, 1, device=CPU).abs()
    beta = torch.sigmoid(cases.normal(rng, 2, 70, 1, device=CPU))
    state = cases.normal(rng, 2, 1, 32, 32, device=CPU)
    state[1] *= scale_of_last
    output, new_state = torch.empty_like(value), torch.empty_like(state)
    workspace = torch.empty(kernels.gated_delta_rule_workspace(2, 70, 1) // 4)
    kernels.gated_delta_rule(
        query, key, value, decay, beta, state, output, new_state, workspace, scale=0.2, key_epsilon=1e-6
    )
    return output, new_state


@pytest.mark.parametrize("operator", cases.OPERATORS)
def test_the_order_of_threads_changes_nothing(kernels: Kernels, operator: str) -> None:
    """A result that depends on it lacks a barrier: bit for bit, in order, backwards, and shuffled after every wait."""
    errors = []
    for order in (0, 1, 12345):
        kernels.library.emulator_set_order(ctypes.c_uint64(order))
        try:
            outcomes = cases.run_cases(kernels, operator, 3, CPU, seed=8, most_work=30)
        finally:
            kernels.library.emulator_set_order(ctypes.c_uint64(0))
        errors.append([outcome.errors for outcome in outcomes])
    assert errors[0] == errors[1] == errors[2]


def test_the_script_for_gpus_tells_good_from_bad(
    kernels: Kernels,
    emulated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """benchmarks/gpu/check.py: every call in the JSON, exit status 1 where one is beyond its limit."""
    report = tmp_path / "cases.json"
    arguments = [str(emulated / "libkernels.so"), "--device", "cpu", "--count", "3", "--most-work", "30"]
    monkeypatch.setattr("sys.argv", ["check", *arguments, "--json", str(report)])
    assert check.main() == 0
    assert "9 of 9 calls within their limits" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert {case["operator"] for case in found} == set(cases.OPERATORS)
    assert all(case["passed"] and case["errors"] and case["sizes"] for case in found)
    monkeypatch.setattr(cases, "LIMITS", dict.fromkeys(LIMITS, 1e-12))
    assert check.main() == 1
    assert "FAILED Outcome(operator='GatedDeltaRule'" in capsys.readouterr().out


def test_an_output_that_is_not_written_or_written_beyond_is_an_error() -> None:
    """What the comparison itself rests on: poison that stays, and guards that are overwritten."""
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    output = cases.Poisoned((2, 3), torch.float32, CPU)
    assert output.error(zeros) == math.inf
    output.tensor.zero_()
    assert output.error(zeros) == 0
    output._all[-1] = 0
    assert output.error(zeros) == math.inf


def _once(call: Callable[[], object]) -> list[float]:
    call()
    return [1.0]


def test_the_benchmark_times_what_transformers_computes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small sizes, each call once: the rival gives the same numbers from the same tensors."""
    for name, value in {
        "TOKENS": 70,
        "KEY_HEADS": 1,
        "VALUE_HEADS": 2,
        "HEAD_DIM": 32,
        "CONV_CHANNELS": 128,
    }.items():
        monkeypatch.setattr(times, name, value)
    monkeypatch.setattr(times, "SCALE", 32**-0.5)
    monkeypatch.setattr(times, "measured", _once)
    rates = {"bytes_per_s": 1e12, "tf32_per_s": 1e12}
    for dtype in LIMITS:
        ours, *rivals = times.time_rule(kernels, dtype, CPU, rates)
        assert ours.difference is None and ours.products_bound_ms and ours.bytes_bound_ms
        assert rivals and rivals[0].what == "GatedDeltaRule, transformers (torch)"
        assert rivals[0].difference is not None and rivals[0].difference <= LIMITS[dtype]
        for time in (
            ours,
            *rivals,
            *(f(kernels, dtype, CPU, rates) for f in (times.time_conv, times.time_head)),
        ):
            assert time.median_ms == 1.0 and time.what in time.line()


def test_infinite_and_not_a_number_stay_visible(kernels: Kernels) -> None:
    """A broken activation must not become a plausible score."""
    hidden = torch.zeros(2, 64)
    hidden[0, 3] = math.nan
    hidden[1] = 1.0
    norm, rows = torch.ones(64), torch.eye(9, 64)
    outputs = torch.empty(2, 9), torch.empty(2), torch.empty(2)
    kernels.rubric_expectation(hidden, norm, rows, torch.ones(2), cases.BINS, *outputs, epsilon=1e-6)
    assert outputs[0][0].isnan().all() and outputs[1][0].isnan()
    assert torch.isfinite(outputs[0][1]).all() and torch.isfinite(outputs[1][1])


REFUSED = {
    "rule, head of 12": (
        "GatedDeltaRule: key_dim is 12; multiples of 8 from 8 to 256 are taken",
        {"key_dim": 12},
    ),
    "rule, head of 264": ("GatedDeltaRule: value_dim is 264", {"value_dim": 264}),
    "rule, heads": ("GatedDeltaRule: 2 value heads are no multiple of 3 key heads", {"key_heads": 3}),
    "rule, states": ("GatedDeltaRule: 2 states cannot serve a batch of 3 rows", {"batch": 3, "states": 2}),
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.values(), ids=REFUSED)
def test_sizes_that_the_rule_does_not_take(kernels: Kernels, message: str, changes: dict[str, int]) -> None:
    sizes = {"batch": 1, "states": 1, "key_heads": 1, "key_dim": 32, "value_dim": 32, **changes}
    batch, heads, states = sizes["batch"], sizes["key_heads"], sizes["states"]
    key = torch.zeros(batch, 2, heads, sizes["key_dim"])
    value = torch.zeros(batch, 2, 2, sizes["value_dim"])
    gates = torch.zeros(batch, 2, 2)
    state = torch.zeros(states, 2, sizes["key_dim"], sizes["value_dim"])
    output = torch.full_like(value, 7.0)
    with pytest.raises(KernelError, match=message):
        kernels.gated_delta_rule(
            key, key, value, gates, gates, state, output, None, torch.zeros(65536), scale=1.0, key_epsilon=0.0
        )
    assert (output == 7.0).all()


def test_other_calls_that_are_refused(kernels: Kernels) -> None:
    x = torch.zeros(1, 2, 12)
    with pytest.raises(KernelError, match="CausalConv1d: there are 12 channels; multiples of 8 are taken"):
        kernels.causal_conv1d(x, torch.zeros(12, 4), None, torch.empty_like(x), None, silu=True)
    x = torch.zeros(1, 2, 16)
    with pytest.raises(KernelError, match="CausalConv1d: the kernel has width 5; 2 to 4 are taken"):
        kernels.causal_conv1d(x, torch.zeros(16, 5), None, torch.empty_like(x), None, silu=True)
    apart = torch.zeros(33)[1:].view(1, 2, 16)
    with pytest.raises(KernelError, match="input is null or does not begin at a multiple of 16 bytes"):
        kernels.causal_conv1d(apart, torch.zeros(16, 4), None, torch.empty(1, 2, 16), None, silu=True)
    outputs = torch.empty(1, 9), torch.empty(1), torch.empty(1)
    inputs = torch.ones(1, 16), torch.ones(16), torch.ones(9, 16), torch.ones(1), cases.BINS
    with pytest.raises(KernelError, match="epsilon is -1; it must be at least 0"):
        kernels.rubric_expectation(*inputs, *outputs, epsilon=-1.0)


def test_the_emulator_rounds_as_ieee_754_says(kernels: Kernels) -> None:
    """All halves to float32; numbers of every size, and the middles between neighbours, to 16 bits."""
    device = "_ZN7zreward6device"
    to_float = getattr(kernels.library, f"{device}15float_from_halfEt")
    to_float.restype, to_float.argtypes = ctypes.c_float, [ctypes.c_uint16]
    to_half = getattr(kernels.library, f"{device}15half_from_floatEf")
    to_bfloat16 = getattr(kernels.library, f"{device}19bfloat16_from_floatEf")
    for function in (to_half, to_bfloat16):
        function.restype, function.argtypes = ctypes.c_uint16, [ctypes.c_float]
    every = np.arange(65536, dtype=np.uint16)
    halves = every.view(np.float16).astype(np.float32)
    found = np.array([to_float(int(bits)) for bits in every], dtype=np.float32)
    np.testing.assert_array_equal(found, halves)
    finite = np.sort(halves[np.isfinite(halves)])
    rng = np.random.default_rng(0)
    middles = rng.choice((finite[:-1] + finite[1:]) / 2, 2000)
    numbers = np.concatenate(
        [middles, rng.normal(size=2000) * 10.0 ** rng.integers(-9, 6, 2000), [65519.9, 65520.0]]
    )
    numbers = numbers.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).view(np.uint16)
    assert [to_half(float(n)) for n in numbers] == expected.tolist()
    rounded = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert [to_bfloat16(float(n)) for n in numbers] == rounded.tolist()
