"""What runs in a repetition: the stages one after the other, as `Scorer` runs them, and then `Scorer` itself.

This is the one place of the benchmark that calls the engine and the scorer. A stage is timed for all candidates of a
repetition together, in the batches that the scorer makes of them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from zreward.image import ImageSpec, preprocess, resized_size
from zreward.runtime.engine import Engine
from zreward.runtime.scorer import Scorer

PARTS = {
    "decode": "decode and resize",
    "vision": "vision tower",
    "system_text": "system text",
    "prompt": "prompt",
    "image_prefix": "image prefix",
    "questions": "all questions",
}
"""Stages that follow each other, by their keys in a report."""

TOTALS = {
    "nothing_kept": "total, nothing kept",
    "new_prompt": "total, new prompt",
    "same_prompt": "total, same prompt",
    "separate": "total, not shared",
}
"""What includes them: all six; all but the system text, which the engine keeps; all but it and the prompt, which the
scorer keeps; all of them anew for every question."""

STAGES = PARTS | TOTALS

T = TypeVar("T")

PROMPT = "a red cube left of a blue ball, a photograph in the evening light"


@dataclass(frozen=True)
class Tokens:
    """How much one repetition reads: patches and tokens of an image, tokens of the texts and of each question."""

    patches: int
    image: int
    system: int
    prompt: int
    questions: tuple[int, ...]


def numbered_prompt(number: int) -> str:
    """A prompt that was not seen before and has as many tokens as the others: digits are a token each."""
    return f"{PROMPT}, take {number:06d}"


def tokens_of(scorer: Scorer, image: bytes) -> Tokens:
    """Of the test prompt and one image."""
    encoder, patches = scorer.engine.encoder, preprocess(image, scorer.contract.image)
    return Tokens(
        patches=len(patches.pixel_values),
        image=patches.n_tokens + 1,  # and the token that closes it
        system=len(encoder.system_ids),
        prompt=len(encoder.text_prefix_ids(numbered_prompt(0))) - len(encoder.system_ids),
        questions=tuple(len(ids) for ids in encoder.question_ids),
    )


def durations(
    scorer: Scorer, prompt: str, images: Sequence[bytes], *, separate: bool = False
) -> dict[str, float]:
    """Milliseconds of each stage of one repetition.

    Args:
        prompt: one that was not used before.
        images: the candidates, encoded.
        separate: also time one full pass for each question.
    """
    timer = _Timer()
    _time_parts(scorer, f"{prompt}, in parts", images, timer)
    scorer.engine.forget_system_text()
    timer.run("nothing_kept", lambda: scorer.score(prompt=f"{prompt}, at first", images=images))
    for name in ("new_prompt", "same_prompt"):
        timer.run(name, lambda: scorer.score(prompt=prompt, images=images))
    if separate:
        timer.run("separate", lambda: _score_separately(scorer.engine, prompt, images))
    return timer.milliseconds


class _Timer:
    """Sums of what is run under each name."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self.milliseconds[name] = self.milliseconds.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        return result


def _time_parts(scorer: Scorer, prompt: str, images: Sequence[bytes], timer: _Timer) -> None:
    engine = scorer.engine
    patches = timer.run("decode", lambda: [preprocess(image, engine.contract.image) for image in images])
    features = timer.run("vision", lambda: [engine.encode_image(p) for p in patches])
    system = timer.run("system_text", engine.system_state)
    state = timer.run("prompt", lambda: engine.prompt_state(prompt, system))
    grid, step = patches[0].token_grid, engine.images_together(state, patches[0].n_tokens)
    for start in range(0, len(images), step):
        batch = features[start : start + step]
        rows = timer.run("image_prefix", partial(engine.image_state, state, batch, grid))
        timer.run("questions", partial(engine.answer, rows))


def _score_separately(engine: Engine, prompt: str, images: Sequence[bytes]) -> None:
    """Every question of every image from pixels and text, as a system that cannot share a prefix does it."""
    for image in images:
        for index in range(len(engine.contract.dimensions)):
            patches = preprocess(image, engine.contract.image)
            state = engine.prompt_state(prompt, engine.system_state())
            rows = engine.image_state(state, [engine.encode_image(patches)], patches.token_grid)
            engine.answer(rows, [index])


def picture(size: int) -> bytes:
    """A smooth, faintly noisy PNG: decoding and resizing cost about what they do for real pictures."""
    ramp = np.linspace(0, 200, size, dtype=np.float32)
    pixels = np.stack(
        np.broadcast_arrays(ramp[None, :], ramp[:, None], (ramp[None, :] + ramp[:, None]) / 2), -1
    )
    noise = np.random.default_rng(0).random(pixels.shape, dtype=np.float32)
    file = io.BytesIO()
    Image.fromarray((pixels + 20 * noise).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def measured_size(size: int, spec: ImageSpec) -> tuple[int, int]:
    """Height and width that the test image has after it was resized to the contract's budget."""
    return resized_size(size, size, spec)
