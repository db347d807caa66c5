"""zreward.runtime.bench.bound: operations are those of a loop over tokens, and bounds are their time."""

from __future__ import annotations

import pytest

from tests.support.bench import RATE, TOKENS, WORK
from zreward.bundle import GraphWork
from zreward.runtime.bench.bound import Operations, bound_ms, stage_operations
from zreward.runtime.bench.rates import Rate


def causal(work: GraphWork, past: int, tokens: int) -> tuple[int, int]:
    """Multiply-adds in whole numbers and in floats, token by token."""
    integer = floats = 0
    for index in range(tokens):
        integer += work.integer_per_row
        floats += work.float_per_row + work.recurrent_per_row
        floats += sum(work.attention_per_pair for _ in range(past + index + 1))
    return integer, floats


def test_every_token_attends_to_the_past_and_to_itself() -> None:
    found = stage_operations(WORK, TOKENS, candidates=3)
    decoder = WORK.decoder
    integer, floats = causal(decoder, 0, TOKENS.prompt)
    assert found["prompt_prefix"] == Operations(2 * integer, 2 * floats)
    integer, floats = causal(decoder, TOKENS.prompt, TOKENS.image)
    assert found["image_prefix"] == Operations(3 * 2 * integer, 3 * 2 * floats)
    asked = [causal(decoder, TOKENS.prompt + TOKENS.image, n) for n in TOKENS.questions]
    heads = 2 * decoder.head_per_sequence
    expected = Operations(3 * 2 * sum(i for i, _ in asked), 3 * 2 * (sum(f for _, f in asked) + heads))
    assert found["questions"] == expected
    tower = TOKENS.patches * 100 + TOKENS.patches**2 * 7
    assert found["vision"] == Operations(3 * 2 * TOKENS.patches * 500, 3 * 2 * tower)


def test_totals_are_the_sums_of_their_stages() -> None:
    found = stage_operations(WORK, TOKENS, candidates=2)
    same = found["vision"] + found["image_prefix"] + found["questions"]
    assert found["same_prompt"] == same
    assert found["new_prompt"] == same + found["prompt_prefix"]
    shared = found["vision"] + found["image_prefix"] + found["prompt_prefix"] * 2
    assert found["separate"] == shared * len(TOKENS.questions) + found["questions"]
    assert "decode" not in found


def test_bounds_are_the_time_of_both_kinds() -> None:
    assert bound_ms(Operations(900_000_000, 230_000_000), RATE) == pytest.approx(2.0)
    floats_only = Rate(1, None, 100.0, "numpy")
    assert bound_ms(Operations(0, 10**9), floats_only) == pytest.approx(10.0)
    assert bound_ms(Operations(1, 10**9), floats_only) is None
