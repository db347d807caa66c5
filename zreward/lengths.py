"""How long the parts of a sequence can be under a contract: what tables and buffers must hold.

A prompt may have `max_prompt_tokens`; joining it to the text around it can only merge tokens, or split a few at the
seams. An image advances the position by its longer side in tokens, and a thin image can be longer than a square one has
tokens. Export sizes rotary tables by these numbers, and builders of engines the shapes that they optimize for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zreward.contract import ScoreContract
from zreward.image import MAX_ASPECT_RATIO, ImageSpec
from zreward.prompt import PromptEncoder

MAX_IMAGES = 8
"""Images that are scored in one run at most, to bound memory."""

_SEAMS = 16


@dataclass(frozen=True)
class Lengths:
    """Most tokens, and as many positions, of each part.

    Attributes:
        text: system text and prompt.
        image: of one image, without the token that closes it.
        question: the longest question.
    """

    text: int
    image: int
    question: int

    @property
    def total(self) -> int:
        """Of a whole sequence."""
        return self.text + self.image + 1 + self.question


def longest_parts(contract: ScoreContract, encoder: PromptEncoder) -> Lengths:
    """The longest parts that `contract` allows."""
    text = len(encoder.text_prefix_ids("x")) + contract.max_prompt_tokens + _SEAMS
    question = max(len(ids) for ids in encoder.question_ids)
    return Lengths(text, most_image_tokens(contract.image), question)


def most_image_tokens(spec: ImageSpec) -> int:
    """Tokens that no image exceeds, nor its longer side: see `resized_size`.

    An image that is reduced fits the budget, or is one token wide; one that is enlarged has both sides rounded up.
    """
    least, most = (pixels / spec.token_size**2 for pixels in (spec.min_pixels, spec.max_pixels))
    thinnest = math.sqrt(MAX_ASPECT_RATIO * most)
    enlarged = (math.sqrt(MAX_ASPECT_RATIO * least) + 1) * (math.sqrt(least / MAX_ASPECT_RATIO) + 1)
    return math.ceil(max(most, thinnest, enlarged))
