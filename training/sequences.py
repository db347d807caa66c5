"""From questions and sampled outputs to the padded batches of a transformers model.

A row is a prompt, an image and a question of the contract, with or without an output after it. In a batch every prompt
with its image stands once, as a prefix that its questions and outputs continue, so that four questions or eight traces
do not pay for it again. Prefixes are padded on the left and what follows them on the right, where neither attention nor
Gated DeltaNet lets the padding reach a token: a batch gives what its rows give alone.

Shape suffixes: u prefixes, b rows, l positions of prefixes, s positions after them, i images, a answers, t sampled
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zreward.contract import ScoreContract
from zreward.image import Patches, preprocess
from zreward.prompt import Ids, PromptEncoder, image_positions
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
        hint: text after the question.
        against: a second image, which follows the first one in the prefix.
        codes: token ids of the answers that are read; None for those of the contract. Rows of a batch have the same.
    """

    prompt: str
    image: Path
    dimension: int
    output: tuple[int, ...] | None = None
    hint: str = ""
    against: Path | None = None
    codes: tuple[int, ...] | None = None

    @property
    def look(self) -> tuple[str, Path, Path | None]:
        """What rows share that continue one prefix."""
        return self.prompt, self.image, self.against


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as tensors.

    Attributes:
        prefix_ids_ul, prefix_mask_ul: int64, text prefix and image placeholders, padded on the left.
        pixel_values: float32 [patches of all images, patch elements]; `grids_i3` has their sizes in patches.
        images_of_prefixes: which images each prefix holds, in order.
        prefix_of_row_b: which prefix each row continues.
        start_b: M-RoPE position of the first token after the prefix.
        ids_bs, mask_bs: int64, question and output, padded on the right.
        answer_rows_a, answer_positions_a: where in `ids_bs` the logits of the answers stand. A row whose output has no
            answer is not among them; a row without an output answers after its last token.
        token_rows_t, token_positions_t, token_ids_t: every token of the outputs, and where its logits stand.
        codes: token ids of the answers that are read.
    """

    prefix_ids_ul: Tensor
    prefix_mask_ul: Tensor
    pixel_values: Tensor
    grids_i3: Tensor
    images_of_prefixes: tuple[tuple[int, ...], ...]
    prefix_of_row_b: Tensor
    start_b: Tensor
    ids_bs: Tensor
    mask_bs: Tensor
    answer_rows_a: Tensor
    answer_positions_a: Tensor
    token_rows_t: Tensor
    token_positions_t: Tensor
    token_ids_t: Tensor
    codes: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def images_of_rows(self) -> list[int]:
        """The images of the rows' prefixes, one row after the other."""
        return [
            image for prefix in self.prefix_of_row_b.tolist() for image in self.images_of_prefixes[prefix]
        ]

    @property
    def positions_3bs(self) -> Tensor:
        """M-RoPE positions of `ids_bs`, int64: text, so equal in all three components."""
        steps = torch.arange(self.ids_bs.shape[1], device=self.ids_bs.device)
        return (self.start_b[:, None] + steps).expand(3, -1, -1)

    @property
    def joined_mask(self) -> Tensor:
        """Attention mask of each row with its prefix, int64 [b, l + s]."""
        return torch.cat([self.prefix_mask_ul[self.prefix_of_row_b], self.mask_bs], dim=1)

    @property
    def joined_ids(self) -> Tensor:
        """Ids of each row with its prefix, int64 [b, l + s]."""
        return torch.cat([self.prefix_ids_ul[self.prefix_of_row_b], self.ids_bs], dim=1)

    def left_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """Ids and mask of each row with its prefix, all padding on the left, as generation needs them.

        They are as wide as the longest prefix and the longest row together, so that states of the prefixes fit.
        """
        ids, mask = self.joined_ids, self.joined_mask
        missing_b1 = self.ids_bs.shape[1] - self.mask_bs.sum(1, keepdim=True)
        sources = torch.arange(ids.shape[1], device=ids.device) - missing_b1
        moved = [part.gather(1, sources.clamp(min=0)) * (sources >= 0) for part in (ids, mask)]
        return torch.where(moved[1].bool(), moved[0], pad_id), moved[1]


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
        looks = list(dict.fromkeys(row.look for row in rows))
        images = list(dict.fromkeys(image for _, *seen in looks for image in seen if image is not None))
        patches = [self._patches(image) for image in images]
        seen_by = [tuple(images.index(image) for image in seen if image is not None) for _, *seen in looks]
        prefixes, starts = zip(
            *(
                self._prefix(look[0], [patches[image] for image in seen])
                for look, seen in zip(looks, seen_by, strict=True)
            ),
            strict=True,
        )
        prefix_of_row = [looks.index(row.look) for row in rows]
        heads = [self._question(row) for row in rows]
        outputs = [np.array(row.output or (), dtype=np.int64) for row in rows]
        prefix_ids, prefix_mask = self._padded(prefixes, left=True)
        joined = [np.concatenate(pair) for pair in zip(heads, outputs, strict=True)]
        ids, mask = self._padded(joined, left=False)
        answer_rows, answer_positions = _columns(self._answers(rows, heads), 2)
        tokens = [
            (row, len(heads[row]) - 1 + place, int(token))
            for row, output in enumerate(outputs)
            for place, token in enumerate(output)
        ]
        token_rows, token_positions, token_ids = _columns(tokens, 3)
        return Batch(
            prefix_ids,
            prefix_mask,
            torch.from_numpy(np.concatenate([patch.pixel_values for patch in patches])),
            torch.tensor([patch.grid_thw for patch in patches]),
            tuple(seen_by),
            torch.tensor(prefix_of_row),
            torch.tensor(starts)[prefix_of_row],
            ids,
            mask,
            answer_rows,
            answer_positions,
            token_rows,
            token_positions,
            token_ids,
            rows[0].codes or self.encoder.code_ids,
        )

    def _prefix(self, prompt: str, seen: Sequence[Patches]) -> tuple[Ids, int]:
        """Ids of text prefix and images, and the position of the token after them.

        The text prefix ends in the token that opens an image; a second image is opened by the same.
        """
        text = self.encoder.text_prefix_ids(prompt)
        parts, position = [text], len(text)
        for number, patches in enumerate(seen):
            if number:
                parts.append(text[-1:])
                position += 1
            _, after_image = image_positions(position, *patches.token_grid)
            parts.append(self.encoder.image_span_ids(patches.n_tokens))
            position = after_image + 1
        return np.concatenate(parts), position

    def _question(self, row: Row) -> Ids:
        if row.output is None:
            return self.encoder.direct_question_ids(row.dimension, row.hint)
        return self.encoder.reasoning_question_ids(row.dimension, row.hint)

    def _padded(self, sequences: Sequence[Ids], *, left: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask of sequences in one tensor each."""
        length = max(len(ids) for ids in sequences)
        ids = np.full((len(sequences), length), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            where = slice(length - len(sequence), None) if left else slice(len(sequence))
            ids[row, where] = sequence
            mask[row, where] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _answers(self, rows: Sequence[Row], heads: Sequence[Ids]) -> list[tuple[int, int]]:
        """Row and position of the logits of each answer."""
        found = []
        for index, (row, head) in enumerate(zip(rows, heads, strict=True)):
            if row.output is None:
                found.append((index, len(head) - 1))
                continue
            place = self._reader.answer_position(row.output)
            if place is not None:
                found.append((index, len(head) + place - 1))
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
