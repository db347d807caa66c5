"""Sizes from the largest to the smallest, round and round.

The largest come first, so that buffers and pools are as large as they get in the first cycle, and memory that grows
later is lost. Where a provider captures CUDA graphs, each size runs in a row until a captured graph was launched. Sizes
that the contract allows have prompts and pictures; those at the limits of an engine's profiles have random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.engines import BATCH, IMAGE, PAST, PATCHES, PREFIX, QUESTIONS, TOKENS, BuiltEngine
from zreward.errors import ZrewardError
from zreward.image import Patches, resized_size
from zreward.lengths import longest_parts
from zreward.prompt import text_positions
from zreward.runtime.conformance.checks import Check, described
from zreward.runtime.conformance.stages import Subject, relative_l2
from zreward.runtime.engine import DecoderState, Engine

Array = NDArray[Any]

_SCALE = 0.1
"""Of random embeddings and states."""


@dataclass(frozen=True)
class Limits:
    """Sizes that a provider takes in one run; of its engine's profiles, or where it has none, of the contract.

    Attributes:
        images: most that start from one prompt together.
        tower: least and most language tokens of an image.
        text: most tokens of text before an image.
        run: most tokens of a run of the prefix.
        image: most tokens of an image before the one that closes it.
        profiled: whether larger sizes are refused.
    """

    images: int
    tower: tuple[int, int]
    text: int
    run: int
    image: int
    profiled: bool


@dataclass(frozen=True)
class Shape:
    """One size.

    Attributes:
        name: for people.
        run: computes it; the result must be the same every time.
    """

    name: str
    run: Callable[[], Array]


@dataclass(frozen=True)
class ShapeResult:
    """What became of a size.

    Attributes:
        runs: how often it ran.
        relative_l2: the furthest that a later result was from the first; None where it is not a number.
        error: why it failed; None where it ran.
    """

    name: str
    runs: int = 0
    relative_l2: float | None = 0.0
    error: str | None = None


@dataclass(frozen=True)
class MemoryWatch:
    """Memory in use after each cycle, in bytes; `what` says whose."""

    what: str
    used_bytes: tuple[int, ...]

    @property
    def growth_mb(self) -> float:
        """After the first cycle."""
        return max(0, *(used - self.used_bytes[0] for used in self.used_bytes[1:])) / 1e6


def limits_of(subject: Subject, built: BuiltEngine | None) -> Limits:
    """Of an engine's profiles, else of the contract and of the memory that the runtime would use."""
    engine, spec = subject.engine, subject.engine.contract.image
    if built is not None:
        tower = built.info.graphs["vision"].profiles
        patches = next(p for p in tower if p.name == IMAGE).axes[PATCHES]
        axes = {p.name: p.axes for p in built.info.graphs["decoder"].profiles}
        text = axes[PREFIX][PAST][2]
        return Limits(
            images=axes[PREFIX][BATCH][2],
            tower=(patches[0] // spec.merge_size**2, patches[2] // spec.merge_size**2),
            text=text,
            run=axes[PREFIX][TOKENS][2],
            image=axes[QUESTIONS][PAST][2] - text - 1,
            profiled=True,
        )
    longest = longest_parts(engine.contract, engine.encoder)
    images = engine.images_together(DecoderState({}, longest.text, longest.text), longest.image)
    return Limits(
        images=min(images, subject.opened.images),
        tower=(1, longest.image),
        text=longest.text,
        run=max(longest.text, longest.image + 1),
        image=longest.image,
        profiled=False,
    )


def shapes_of(subject: Subject, limits: Limits) -> list[Shape]:
    """All sizes of a cycle, the largest first."""
    engine = subject.engine
    random = _Random(engine)
    least, most = limits.tower
    shortest = int(np.argmin([len(ids) for ids in engine.encoder.question_ids]))
    return [
        Shape(f"tower, {most:,} tokens", lambda: engine.encode_image(random.patches(most))),
        Shape(f"text, {limits.run:,} tokens", lambda: random.text(0, limits.run)),
        Shape(
            f"{limits.images} × {limits.image:,} image tokens after {limits.text:,}, all questions",
            lambda: random.images(limits),
        ),
        *_allowed(engine, limits),
        Shape(f"tower, {least:,} token", lambda: engine.encode_image(random.patches(least))),
        Shape("text, 1 token", lambda: random.text(0, 1)),
        Shape("1 question after 1 token", lambda: engine.answer(random.state(1), [shortest]).probs),
    ]


def cycle(
    shapes: Sequence[Shape],
    cycles: int,
    in_a_row: int,
    *,
    watch: Callable[[], int | None],
    heard: Callable[[int], None],
) -> tuple[tuple[ShapeResult, ...], tuple[int, ...]]:
    """Run all sizes in turn; what became of each, and the memory in use after each cycle.

    Args:
        in_a_row: runs of a size before the next one.
        watch: memory in use; None where nobody tells.
        heard: is called with the number of sizes that are done.
    """
    results = {shape.name: ShapeResult(shape.name) for shape in shapes}
    first: dict[str, Array] = {}
    used: list[int] = []
    for number in range(cycles):
        for place, shape in enumerate(shapes):
            heard(number * len(shapes) + place)
            for _ in range(in_a_row):
                if results[shape.name].error is None:
                    results[shape.name] = _again(shape, results[shape.name], first)
        found = watch()
        used += [] if found is None else [found]
    heard(cycles * len(shapes))
    return tuple(results.values()), tuple(used)


def batch_difference(engine: Engine, limits: Limits) -> float:
    """How far answers depend on what runs beside them: the largest difference of a bin probability.

    Questions one to all at once, and the same image alone and as often as a run takes.
    """
    prompt = engine.prompt_state(prompts_of(engine)["short"])
    patches = _picture(engine, (2, 3))
    features = engine.encode_image(patches)
    alone = engine.image_state(prompt, [features], patches.token_grid)
    expected = engine.answer(alone).probs[0]
    apart = [
        np.abs(engine.answer(alone, range(n)).probs[0] - expected[:n]).max()
        for n in range(1, len(engine.contract.dimensions) + 1)
    ]
    together = engine.image_state(prompt, [features] * limits.images, patches.token_grid)
    apart.append(np.abs(engine.answer(together).probs - expected).max())
    return float(np.max(apart))


def refusals(subject: Subject, limits: Limits) -> Iterator[tuple[str, str | None]]:
    """What is beyond the limits, and the message that it was refused with; None where it was not."""
    engine, random = subject.engine, _Random(subject.engine)
    beyond: dict[str, Callable[[], object]]
    if limits.profiled:
        most, images = limits.tower[1] + 1, limits.images + 1
        features = np.zeros((1, engine.bundle.manifest.model.hidden_size), np.float32)
        beyond = {
            f"an image of {most:,} tokens": lambda: engine.encode_image(random.patches(most)),
            f"{images} images together": lambda: engine.image_state(
                random.state(1), [features] * images, (1, 1)
            ),
        }
    else:
        patches = random.patches(1)
        wide = replace(patches, pixel_values=np.pad(patches.pixel_values, ((0, 0), (0, 1))))
        beyond = {"patches of one value too many": lambda: engine.encode_image(wide)}
    for name, run in beyond.items():
        try:
            run()
        except ZrewardError as error:
            yield name, described(error)
        else:
            yield name, None


def refusal_check(subject: Subject, limits: Limits) -> Iterator[Check]:
    """Every size beyond the limits is refused with a message, and the next run works."""
    found = dict(refusals(subject, limits))
    taken = [name for name, message in found.items() if not message]
    engine = subject.engine
    after = engine.answer(engine.prompt_state(prompts_of(engine)["short"]), [0]).probs
    if taken:
        yield Check.that("refusal", False, f"not refused: {'; '.join(taken)}")
    elif not np.isfinite(after).all():
        yield Check.that("refusal", False, "the run after a refusal gave no numbers")
    else:
        yield Check.that("refusal", True, "; ".join(f"{name}: {message}" for name, message in found.items()))


def prompts_of(engine: Engine) -> Mapping[str, str]:
    """A prompt of one word, and one of as many as the contract takes."""
    words, encoder = 1, engine.encoder
    most = engine.contract.max_prompt_tokens

    def fits(n: int) -> bool:
        try:
            encoder.text_prefix_ids("a " * n)
        except ZrewardError:
            return False
        return True

    while words < most and fits(2 * words):
        words *= 2
    return {"short": "a", "long": "a " * words}


def _allowed(engine: Engine, limits: Limits) -> Iterator[Shape]:
    """Sizes of real pictures and prompts, each with one to all questions."""
    spec = engine.contract.image
    side = math.isqrt(spec.max_pixels)
    sizes = {
        "largest square": (side, side),
        "wide": (side // 2, side * 2),
        "tall": (side * 2, side // 2),
        "smallest": (1, 1),
    }
    prompts = prompts_of(engine)
    for (name, size), prompt in zip(sizes.items(), ("long", "short", "long", "short"), strict=True):
        height, width = resized_size(*size, spec)
        grid = height // spec.token_size, width // spec.token_size
        images = limits.images if name == "smallest" else 1
        pictures = f"{images} × {width}×{height}" if images > 1 else f"{width}×{height}"
        questions = len(engine.contract.dimensions)
        title = f"{name} image, {pictures}, {prompt} prompt, {questions} to 1 questions"

        def run(grid: tuple[int, int] = grid, prompt: str = prompts[prompt], images: int = images) -> Array:
            patches = _picture(engine, grid)
            features = [engine.encode_image(patches)] * images
            state = engine.image_state(engine.prompt_state(prompt), features, grid)
            asked = range(len(engine.contract.dimensions), 0, -1)
            return np.concatenate([engine.answer(state, range(n)).probs.ravel() for n in asked])

        yield Shape(title, run)


def _again(shape: Shape, result: ShapeResult, first: dict[str, Array]) -> ShapeResult:
    try:
        found = shape.run()
    except Exception as error:  # of whatever provider
        return replace(result, error=described(error))
    if not np.isfinite(found).all():
        return replace(result, error="it gave no numbers (NaN or infinity)")
    apart = relative_l2(found, first.setdefault(shape.name, found))
    furthest = None if result.relative_l2 is None else max(result.relative_l2, apart)
    return replace(result, runs=result.runs + 1, relative_l2=furthest if np.isfinite(apart) else None)


def _picture(engine: Engine, grid: tuple[int, int]) -> Patches:
    """Patches of a grid of tokens, alike every time."""
    return _Random(engine).patches(grid[0] * grid[1], grid)


class _Random:
    """Inputs of any size, alike every time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._manifest, self._spec = engine.bundle.manifest, engine.contract.image

    def patches(self, tokens: int, grid: tuple[int, int] | None = None) -> Patches:
        """An image of so many tokens, as square as that goes."""
        spec = self._spec
        rows, columns = grid or _nearly_square(tokens)
        width = 3 * spec.temporal_patch_size * spec.patch_size**2
        pixels = np.random.default_rng(0).uniform(-1, 1, (tokens * spec.merge_size**2, width))
        thw = 1, rows * spec.merge_size, columns * spec.merge_size
        return Patches(pixels.astype(np.float32), thw, spec.merge_size)

    def state(self, past: int) -> DecoderState:
        """The state of one row after so many tokens."""
        generator = np.random.default_rng(1)
        arrays = {
            s.input: (_SCALE * generator.standard_normal(s.sizes(rows=1, past=past))).astype(s.dtype)
            for s in self._manifest.states
        }
        return DecoderState(arrays, past, past)

    def text(self, past: int, tokens: int) -> Array:
        """One of the states after `tokens` more."""
        embeddings = self._embeddings(tokens)[None]
        positions = text_positions(past, tokens)
        state = self._engine.advance(self.state(past), embeddings, positions, past + tokens)
        return np.asarray(state.arrays[self._manifest.states[0].input])

    def images(self, limits: Limits) -> Array:
        """All answers about as many images as fit, each as large as they get."""
        features = [self._embeddings(limits.image)] * limits.images
        state = self._engine.image_state(self.state(limits.text), features, _nearly_square(limits.image))
        return self._engine.answer(state).probs

    def _embeddings(self, tokens: int) -> NDArray[np.float32]:
        shape = tokens, self._manifest.model.hidden_size
        return (_SCALE * np.random.default_rng(2).standard_normal(shape)).astype(np.float32)


def _nearly_square(tokens: int) -> tuple[int, int]:
    """Rows and columns of a grid of so many tokens."""
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return rows, tokens // rows
