"""Where the score stands in a sampled output, found by token ids.

An output is a reasoning trace, the token that ends it, white space, and the answer. The score is read from the logits
at the answer's position, over the codes of the contract alone, whatever token was sampled there. An output that never
ends its trace has no such position: it is a failed sample, and nothing is parsed out of its text.

Shape suffixes as in `losses.py`, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from zreward.prompt import Ids, PromptEncoder


class TraceReader:
    """Finds answers in outputs of one contract and tokenizer."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self.end_id = encoder.end_of_reasoning_id
        self._blank: dict[int, bool] = {}

    def answer_position(self, output_ids: Sequence[int]) -> int | None:
        """Index of the first token after the end of the trace that is not white space; None where there is none."""
        ids = list(output_ids)
        if self.end_id not in ids:
            return None
        for position in range(ids.index(self.end_id) + 1, len(ids)):
            if not self._is_blank(ids[position]):
                return position
        return None

    def trace_text(self, output_ids: Sequence[int]) -> str:
        """The reasoning of an output as text, for logs; all of it where the trace has no end."""
        ids = list(output_ids)
        end = ids.index(self.end_id) if self.end_id in ids else len(ids)
        return self._encoder.text_of(np.array(ids[:end], dtype=np.int64)).strip()

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._encoder.text_of(_one(token)).strip()
        return self._blank[token]


class UntilAnswer(StoppingCriteria):
    """Stops each sequence of a generation once its answer is there, so that nothing is sampled after a score."""

    def __init__(self, reader: TraceReader, prompt_length: int) -> None:
        self._reader = reader
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        outputs = input_ids[:, self._prompt_length :]
        done = (outputs == self._reader.end_id).any(1)  # few have ended their trace, and only those are read
        for row in done.nonzero()[:, 0].tolist():
            done[row] = self._reader.answer_position(outputs[row].tolist()) is not None
        return done


@dataclass(frozen=True)
class ClosedSet:
    """The score distributions at the answers' positions.

    Attributes:
        log_probs_nk: float32 log-probabilities of the bins, softmax over the codes alone at temperature 1.
        off_scale_n: probability of everything that is no code in the full vocabulary, without gradient; where it is
            large, the model would rather not have answered with a score.
    """

    log_probs_nk: Tensor
    off_scale_n: Tensor


def closed_set(logits_nv: Tensor, code_ids: Sequence[int]) -> ClosedSet:
    """Read the scores from full-vocabulary logits at the answers' positions."""
    logits = logits_nv.float()
    codes_nk = logits[:, list(code_ids)]
    with torch.no_grad():
        mass = (codes_nk.logsumexp(-1) - logits.logsumexp(-1)).exp()
    return ClosedSet(codes_nk.log_softmax(-1), (1 - mass).clamp(0, 1))


def _one(token: int) -> Ids:
    return np.array([token], dtype=np.int64)
