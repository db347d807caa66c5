"""Optimization profiles: the sizes that an engine takes, and those that it is made fast for.

They follow from the contract, by the stages of a score. The tower sees one image; most pictures have more pixels than
the contract's budget and are reduced to it, so that is the typical size. The decoder runs on

    prefix      the system text, the prompt, or images after it: many tokens in one row, or in a few rows that start
                from one state
    questions   the questions about one image, or about a few: short rows, for each state as many as dimensions
"""

from __future__ import annotations

from collections.abc import Mapping

from zreward.contract import ScoreContract
from zreward.engines import BATCH, IMAGE, PAST, PATCHES, PREFIX, QUESTIONS, STATES, TOKENS, Profile
from zreward.errors import UsageError
from zreward.lengths import longest_parts
from zreward.prompt import PromptEncoder


def profiles(
    contract: ScoreContract, encoder: PromptEncoder, images: int
) -> Mapping[str, tuple[Profile, ...]]:
    """The profiles of both graphs.

    Args:
        contract: whose longest prompts and largest images they hold.
        encoder: of that contract.
        images: most images that are scored in one run.

    Raises:
        UsageError: fewer than one image.
    """
    if images < 1:
        raise UsageError(f"images in a run must be at least 1, not {images}")
    longest = longest_parts(contract, encoder)
    patches_a_token = contract.image.merge_size**2
    budget = contract.image.max_pixels // contract.image.token_size**2
    text = len(encoder.text_prefix_ids("x"))
    dimensions, question = len(contract.dimensions), longest.question
    shortest = min(len(ids) for ids in encoder.question_ids)
    image = Profile(
        IMAGE,
        {PATCHES: (patches_a_token, budget * patches_a_token, longest.image * patches_a_token)},
    )
    prefix = Profile(
        PREFIX,
        {
            BATCH: (1, 1, images),
            TOKENS: (1, budget + 1, max(longest.text, longest.image + 1)),
            STATES: (1, 1, 1),
            PAST: (0, text, longest.text),
        },
    )
    questions = Profile(
        QUESTIONS,
        {
            BATCH: (1, dimensions, dimensions * images),
            TOKENS: (shortest, question, question),
            STATES: (1, 1, images),
            PAST: (1, text + budget + 1, longest.text + longest.image + 1),
        },
    )
    return {"vision": (image,), "decoder": (prefix, questions)}
