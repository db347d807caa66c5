"""From questions and sampled outputs to one padded batch of a transformers model.

A row is a prompt, an image and a question of the contract, with or without an output after it. Rows are padded on the
left, where neither attention nor Gated DeltaNet sees the padding (its inputs are set to zero, which leaves an empty
state empty), so that a batch gives what its rows give alone. An image that several rows share is encoded once.

Shape suffixes: b rows, l positions, i images, a answers, t sampled tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zreward.contract import ScoreContract
from zreward.image import Patches, preprocess
from zreward.prompt import Ids, PromptEncoder
from zreward.training.traces import TraceReader

_KEPT_IMAGES = 64
"""Images whose patches stay in memory: those of a few steps, since a step asks the same image several times."""


@dataclass(frozen=True)
class Row:
    """One sequence to be run.

    Attributes:
        prompt: the user's text.
        image: path of the image.
        dimension: number of the contract's dimension that is asked about.
        output: ids after an open think block (a trace and its answer); None asks with thinking off.
    """

    prompt: str
    image: Path
    dimension: int
    output: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as tensors.

    Attributes:
        input_ids_bl, attention_mask_bl: int64.
        pixel_values: float32 [patches of all images, patch elements]; `grids_i3` has their sizes in patches.
        image_of_row_b: which image each row looks at.
        answer_rows_a, answer_positions_a: where the logits of the answers stand. A row whose output has no answer is
            not among them; a row without an output answers after its last token.
        token_rows_t, token_positions_t, token_ids_t: every token of the outputs, and where its logits stand.
    """

    input_ids_bl: Tensor
    attention_mask_bl: Tensor
    pixel_values: Tensor
    grids_i3: Tensor
    image_of_row_b: Tensor
    answer_rows_a: Tensor
    answer_positions_a: Tensor
    token_rows_t: Tensor
    token_positions_t: Tensor
    token_ids_t: Tensor

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **moved)


class Collator:
    """Makes batches for one contract and tokenizer."""

    def __init__(self, contract: ScoreContract, encoder: PromptEncoder, pad_id: int) -> None:
        self.contract = contract
        self.encoder = encoder
        self.pad_id = pad_id
        self._patches = lru_cache(maxsize=_KEPT_IMAGES)(self._read)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The rows in one batch, in order.

        Raises:
            ImageError: an image is damaged; PromptError: a prompt is too long for the contract.
        """
        images = list(dict.fromkeys(row.image for row in rows))
        patches = {image: self._patches(image) for image in images}
        heads = [self._question(row, patches[row.image].n_tokens) for row in rows]
        outputs = [np.array(row.output or (), dtype=np.int64) for row in rows]
        sequences = [np.concatenate(pair) for pair in zip(heads, outputs, strict=True)]
        length = max(len(ids) for ids in sequences)
        ids_bl = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        mask_bl = np.zeros_like(ids_bl)
        for row, ids in enumerate(sequences):
            ids_bl[row, length - len(ids) :] = ids
            mask_bl[row, length - len(ids) :] = 1
        answers = self._answers(rows, heads, length)
        tokens = [
            (row, length - len(output) - 1 + place, int(token))
            for row, output in enumerate(outputs)
            for place, token in enumerate(output)
        ]
        answer_rows, answer_positions = _columns(answers, 2)
        token_rows, token_positions, token_ids = _columns(tokens, 3)
        return Batch(
            torch.from_numpy(ids_bl),
            torch.from_numpy(mask_bl),
            torch.from_numpy(np.concatenate([patches[image].pixel_values for image in images])),
            torch.tensor([patches[image].grid_thw for image in images]),
            torch.tensor([images.index(row.image) for row in rows]),
            answer_rows,
            answer_positions,
            token_rows,
            token_positions,
            token_ids,
        )

    def _question(self, row: Row, n_tokens: int) -> Ids:
        if row.output is None:
            return self.encoder.sequence_ids(row.prompt, n_tokens, row.dimension)
        prefix = self.encoder.text_prefix_ids(row.prompt)
        question = self.encoder.reasoning_question_ids(row.dimension)
        return np.concatenate([prefix, self.encoder.image_span_ids(n_tokens), question])

    def _answers(self, rows: Sequence[Row], heads: Sequence[Ids], length: int) -> list[tuple[int, int]]:
        """Row and position of the logits of each answer."""
        found = []
        for index, row in enumerate(rows):
            if row.output is None:
                found.append((index, length - 1))
                continue
            place = self._reader.answer_position(row.output)
            if place is not None:
                found.append((index, length - len(row.output) + place - 1))
        return found

    @cached_property
    def _reader(self) -> TraceReader:
        return TraceReader(self.encoder)

    def _read(self, image: Path) -> Patches:
        return preprocess(image, self.contract.image)


def _columns(entries: Sequence[tuple[int, ...]], width: int) -> tuple[Tensor, ...]:
    """Columns of a list of tuples as int64, also of an empty list."""
    table = torch.tensor(entries, dtype=torch.int64).reshape(-1, width)
    return tuple(table[:, column] for column in range(width))
