"""What a stage multiplies, and the time that this would take at the rate of the machine: its bound.

The manifest counts the operations of a row (`zreward.bundle.GraphWork`), and a stage has so many rows. Counted is what
its task takes: no tokens of padding, and no score head where nobody reads the scores. A bound is what no implementation
of these graphs goes below on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zreward.bundle import GraphWork, Work
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.stages import Tokens


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions of one repetition of a stage.

    Attributes:
        integer: in 8-bit whole numbers.
        float: in float32.
        bfloat16: in bfloat16 where the processor has it, else in float32.
    """

    integer: int
    float: int
    bfloat16: int

    @property
    def total(self) -> int:
        """In any of them."""
        return self.integer + self.float + self.bfloat16

    def __add__(self, other: Operations) -> Operations:
        return Operations(
            self.integer + other.integer, self.float + other.float, self.bfloat16 + other.bfloat16
        )

    def __mul__(self, times: int) -> Operations:
        return Operations(times * self.integer, times * self.float, times * self.bfloat16)


def stage_operations(work: Work, tokens: Tokens, candidates: int) -> Mapping[str, Operations]:
    """Operations of each stage that multiplies, for all candidates of a repetition."""
    vision = _run(work.vision, tokens.patches, pairs=tokens.patches**2)
    text = tokens.system + tokens.prompt
    system = _causal(work.decoder, tokens.system, past=0)
    prompt = _causal(work.decoder, tokens.prompt, past=tokens.system)
    image = _causal(work.decoder, tokens.image, past=text)
    head = Operations(2 * work.decoder.integer_per_sequence, 2 * work.decoder.float_per_sequence, 0)
    asked = [_causal(work.decoder, n, past=text + tokens.image) + head for n in tokens.questions]
    questions = sum(asked, Operations(0, 0, 0))
    same_prompt = (vision + image + questions) * candidates
    return {
        "vision": vision * candidates,
        "system_text": system,
        "prompt": prompt,
        "image_prefix": image * candidates,
        "questions": questions * candidates,
        "nothing_kept": same_prompt + prompt + system,
        "new_prompt": same_prompt + prompt,
        "same_prompt": same_prompt,
        "separate": ((vision + system + prompt + image) * len(asked) + questions) * candidates,
    }


def bound_ms(operations: Operations, rate: Rate) -> float | None:
    """Milliseconds at that rate; None where the rate of whole numbers is needed and not known."""
    if operations.integer and rate.integer_gops is None:
        return None
    seconds = operations.float / (1e9 * rate.float_gops)
    seconds += operations.bfloat16 / (1e9 * (rate.bfloat16_gops or rate.float_gops))
    if rate.integer_gops is not None:
        seconds += operations.integer / (1e9 * rate.integer_gops)
    return 1e3 * seconds


def _causal(work: GraphWork, tokens: int, *, past: int) -> Operations:
    """Tokens that attend to the past and to those before them, themselves included."""
    return _run(work, tokens, pairs=tokens * past + tokens * (tokens + 1) // 2)


def _run(work: GraphWork, rows: int, *, pairs: int) -> Operations:
    floats = rows * (work.float_per_row + work.recurrent_per_row) + pairs * work.attention_per_pair
    return Operations(
        2 * rows * work.integer_per_row, 2 * floats, 2 * pairs * work.rounded_attention_per_pair
    )
