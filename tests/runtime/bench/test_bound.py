"""zreward.runtime.bench.bound: operations are those of a loop over tokens, and bounds are their time."""

from __future__ import annotations

import pytest

from tests.support.bench import RATE, TOKENS, WORK
from zreward.bundle import GraphWork
from zreward.runtime.bench.bound import Operations, bound_ms, stage_operations
from zreward.runtime.bench.rates import Rate


def causal(work: GraphWork, past: int, tokens: int) -> Operations:
    """Operations token by token."""
    integer = floats = rounded = 0
    for index in range(tokens):
        integer += work.integer_per_row
        floats += work.float_per_row + work.recurrent_per_row
        for _ in range(past + index + 1):
            floats += work.attention_per_pair
            rounded += work.rounded_attention_per_pair
    return Operations(2 * integer, 2 * floats, 2 * rounded)


def test_every_token_attends_to_the_past_and_to_itself() -> None:
    found = stage_operations(WORK, TOKENS, candidates=3)
    decoder, text = WORK.decoder, TOKENS.system + TOKENS.prompt
    assert found["system_text"] == causal(decoder, 0, TOKENS.system)
    assert found["prompt"] == causal(decoder, TOKENS.system, TOKENS.prompt)
    assert found["image_prefix"] == causal(decoder, text, TOKENS.image) * 3
    head = Operations(2 * 70, 2 * 90, 0)
    asked = [causal(decoder, text + TOKENS.image, n) + head for n in TOKENS.questions]
    assert found["questions"] == sum(asked, Operations(0, 0, 0)) * 3
    patches = TOKENS.patches
    tower = Operations(2 * patches * 500, 2 * (patches * 100 + patches**2 * 7), 2 * patches**2 * 5)
    assert found["vision"] == tower * 3


def test_totals_are_the_sums_of_their_stages() -> None:
    found = stage_operations(WORK, TOKENS, candidates=2)
    same = found["vision"] + found["image_prefix"] + found["questions"]
    assert found["same_prompt"] == same
    assert found["new_prompt"] == same + found["prompt"]
    assert found["nothing_kept"] == same + found["prompt"] + found["system_text"]
    shared = found["vision"] + found["image_prefix"] + (found["system_text"] + found["prompt"]) * 2
    assert found["separate"] == shared * len(TOKENS.questions) + found["questions"]
    assert "decode" not in found


def test_bounds_are_the_time_of_all_kinds() -> None:
    assert bound_ms(Operations(900_000_000, 230_000_000, 460_000_000), RATE) == pytest.approx(3.0)
    floats_only = Rate(1, None, 100.0, None, "numpy")
    assert bound_ms(Operations(0, 10**9, 10**9), floats_only) == pytest.approx(20.0)
    assert bound_ms(Operations(1, 10**9, 0), floats_only) is None
