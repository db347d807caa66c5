"""Calibration and held-out data: prompts with images, and the batches that the network reads.

Items go through the same contract, prompt and image code as training, export and runtime. Without a file of the
user's own they are synthetic rubric scenes, from a split of the generator that no training saw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import QuantizationError
from zreward.image import ImageInput, Patches, preprocess
from zreward.pairs import LineError, pair_from_object, parse_line, read_lines
from zreward.prompt import Ids, PromptEncoder, image_positions, text_positions
from zreward.synthetic import SceneConfig, generate

CALIBRATION_SEED, HELD_OUT_SEED = 5_000, 3_000
"""Splits of the scene generator: calibration has its own; held-out is the reference student's test split."""

SCENES = "scenes"
"""In place of a data file: synthetic rubric scenes."""

SCENES_MAX_PARAMETERS = 300_000_000

_BATCH_TOKENS = 8_192
_LISTED = 5


@dataclass(frozen=True)
class Item:
    """A prompt with one image; `scores` has the labels of the dimensions that are labelled."""

    prompt: str
    image: ImageInput
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Images of one size with one question each.

    Attributes:
        indices: which item each row is, int64 [rows].
        pixel_values: float32 [images·patches, channels], the images one after the other.
        images: which image each row has, int64 [rows].
        grid_thw: patches of each image in time, height and width.
        ids: int64 [rows, tokens], padded to the right by each row's last token.
        lengths: int64 [rows], tokens before the padding.
        positions: M-RoPE positions, int64 [3, rows, tokens].
        dimensions: the question that each row asks, int64 [rows].
    """

    indices: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    images: NDArray[np.int64]
    grid_thw: tuple[int, int, int]
    ids: Ids
    lengths: NDArray[np.int64]
    positions: NDArray[np.int64]
    dimensions: NDArray[np.int64]

    @property
    def image_items(self) -> NDArray[np.int64]:
        """Which item each image belongs to, int64 [images]."""
        items = np.zeros(int(self.images.max()) + 1, dtype=np.int64)
        items[self.images] = self.indices
        return items


def items_from_file(path: Path) -> list[Item]:
    """The items of a JSONL file with `prompt` and `image` a line, and `scores` where there are labels.

    Image paths are taken from the file's folder.

    Raises:
        QuantizationError: no such file, a line that is not an item, or images that do not exist.
    """
    if not path.is_file():
        raise QuantizationError(f"{path}: no such file; expected JSONL with a prompt and an image a line")
    items, missing = [], []
    with path.open("rb") as stream:
        for line in read_lines(stream):
            try:
                pair = pair_from_object(parse_line(line), path.parent)
            except LineError as error:
                raise QuantizationError(f"{path}, line {line.number}: {error}") from None
            if not pair.image.is_file():
                missing.append(f"line {line.number}: {pair.image}")
            items.append(Item(pair.prompt, pair.image, pair.scores))
    if missing:
        shown = "; ".join(missing[:_LISTED]) + ("; …" if len(missing) > _LISTED else "")
        raise QuantizationError(f"{path}: {len(missing)} of {len(items)} images do not exist: {shown}")
    if not items:
        raise QuantizationError(f"{path}: no items; expected a prompt and an image a line")
    return items


def calibration_items(source: str) -> list[Item]:
    """What to calibrate on: the items of a JSONL file, or synthetic scenes for `SCENES`."""
    return scene_items(CALIBRATION_SEED, 128, 2) if source == SCENES else items_from_file(Path(source))


def default_data(checkpoint: Checkpoint) -> str | None:
    """What to calibrate and judge on where nothing is given: scenes for small models, nothing for others.

    Scenes are cheap and always there, but they are not the images that a large model was trained for.
    """
    return SCENES if checkpoint.n_parameters <= SCENES_MAX_PARAMETERS else None


def held_out_items(source: str) -> list[Item]:
    """What to judge on: the items of a JSONL file, or for `SCENES` 400 prompts with six images each."""
    return scene_items(HELD_OUT_SEED, 400, 6) if source == SCENES else items_from_file(Path(source))


def scene_items(seed: int, n_prompts: int, candidates: int) -> list[Item]:
    """Synthetic rubric scenes as items, `candidates` images for each prompt."""
    return [
        Item(scene.prompt, candidate.image, candidate.human_scores)
        for scene in generate(SceneConfig(), seed=seed, n_prompts=n_prompts, candidates=candidates)
        for candidate in scene.candidates
    ]


def batches(
    items: Sequence[Item], contract: ScoreContract, encoder: PromptEncoder, *, all_questions: bool = False
) -> list[Batch]:
    """Batches of items of one image size, at most about 8,192 tokens each.

    Args:
        items: what to read.
        contract: of the model.
        encoder: of the model.
        all_questions: ask every question of every item; otherwise item i asks question i modulo their number.
    """
    n_dimensions = len(contract.dimensions)
    by_grid: dict[tuple[int, int, int], list[_Row]] = defaultdict(list)
    for index, item in enumerate(items):
        patches = preprocess(item.image, contract.image)
        for dimension in range(n_dimensions) if all_questions else [index % n_dimensions]:
            ids, positions = _sequence(encoder, item.prompt, patches, dimension)
            by_grid[patches.grid_thw].append(_Row(index, dimension, patches.pixel_values, ids, positions))
    return [_batch(grid, rows) for grid, group in by_grid.items() for rows in _chunks(group)]


@dataclass(frozen=True)
class _Row:
    index: int
    dimension: int
    pixel_values: NDArray[np.float32]
    ids: Ids
    positions: NDArray[np.int64]


def _sequence(encoder: PromptEncoder, prompt: str, patches: Patches, dimension: int) -> tuple[Ids, Ids]:
    """Ids [n] and positions [3, n] of a whole sequence."""
    ids = encoder.sequence_ids(prompt, patches.n_tokens, dimension)
    before = len(encoder.text_prefix_ids(prompt))
    image, after = image_positions(before, *patches.token_grid)
    rest = text_positions(after, len(ids) - before - patches.n_tokens)
    return ids, np.concatenate([text_positions(0, before), image, rest], axis=1)


def _chunks(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Rows of similar length together."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    step = max(1, _BATCH_TOKENS // max(len(row.ids) for row in rows))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _batch(grid: tuple[int, int, int], rows: list[_Row]) -> Batch:
    longest = max(len(row.ids) for row in rows)
    padded = [np.pad(row.ids, (0, longest - len(row.ids)), mode="edge") for row in rows]
    positions = [np.pad(row.positions, ((0, 0), (0, longest - len(row.ids))), mode="edge") for row in rows]
    pixels = {row.index: row.pixel_values for row in rows}
    place = {index: image for image, index in enumerate(pixels)}
    return Batch(
        indices=np.array([row.index for row in rows]),
        pixel_values=np.concatenate(list(pixels.values())),
        images=np.array([place[row.index] for row in rows]),
        grid_thw=grid,
        ids=np.stack(padded),
        lengths=np.array([len(row.ids) for row in rows]),
        positions=np.stack(positions, axis=1),
        dimensions=np.array([row.dimension for row in rows]),
    )
