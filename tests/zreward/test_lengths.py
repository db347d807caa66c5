"""zreward.lengths: no image that the preprocessor makes is longer than what it says."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import small_contract, small_tokenizer
from zreward.contract import ScoreContract
from zreward.image import MAX_ASPECT_RATIO, ImageSpec, resized_size
from zreward.lengths import longest_parts, most_image_tokens
from zreward.prompt import PromptEncoder


@given(
    height=st.integers(1, 5000),
    aspect=st.floats(1 / MAX_ASPECT_RATIO, MAX_ASPECT_RATIO),
    least=st.integers(1, 64),
    more=st.integers(0, 1000),
)
def test_no_image_has_more_tokens_nor_a_longer_side(
    height: int, aspect: float, least: int, more: int
) -> None:
    width = round(height * aspect)
    if not height / MAX_ASPECT_RATIO <= width <= height * MAX_ASPECT_RATIO or width < 1:
        return
    side = 32
    spec = ImageSpec(min_pixels=least * side**2, max_pixels=(least + more) * side**2)
    rows, columns = (size // side for size in resized_size(height, width, spec))
    most = most_image_tokens(spec)
    assert rows * columns <= most and max(rows, columns) <= most


def test_an_ordinary_budget_is_its_own_bound() -> None:
    assert most_image_tokens(ImageSpec()) == 1024
    assert most_image_tokens(ImageSpec(min_pixels=32**2, max_pixels=32**2)) == math.ceil(
        (math.sqrt(200) + 1) * (math.sqrt(1 / 200) + 1)
    )


def test_a_sequence_is_the_sum_of_its_parts() -> None:
    contract: ScoreContract = small_contract(8)
    encoder = PromptEncoder(contract, small_tokenizer())
    longest = longest_parts(contract, encoder)
    assert longest.text >= len(encoder.text_prefix_ids("x " * 100))
    assert longest.question == max(len(ids) for ids in encoder.question_ids)
    assert longest.total == longest.text + longest.image + 1 + longest.question
