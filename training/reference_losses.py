"""What the reference student is trained on: the scores, and the auxiliary heads that are thrown away later.

Shape suffixes as in `reference_forward`; s is the severity or error level, f the fields that have one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from zreward.synthetic import DIMENSIONS, Defects
from zreward.synthetic.language import COLOURS, RELATIONS, SHAPES
from zreward.synthetic.truth import DEFECTS_OF, MAX_SEVERITY
from zreward.training.reference_data import (
    COVERS,
    ERROR_KINDS,
    FLAWS,
    GROUPS,
    MATCHES,
    MAX_DRAWN,
    MAX_ERRORS,
    NO_RELATION,
    SceneArrays,
)
from zreward.training.reference_forward import Answers

IntArray = NDArray[Any]

_LEVELS = MAX_SEVERITY + 1
_DEFECT_NAMES = [field.name for field in dataclasses.fields(Defects)]


class AuxiliaryHeads(nn.Module):
    """Linear read-outs of image tokens and of the score positions; not part of the student."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.shape = nn.Linear(width, len(SHAPES) + 1)
        self.rank = nn.Linear(width, MAX_DRAWN + 1)
        self.base = nn.Linear(width, 1)
        self.counts = nn.Linear(2 * width, (len(COLOURS) + len(SHAPES)) * (MAX_DRAWN + 1))
        self.cover = nn.Linear(width, len(COVERS))
        self.flaws = nn.Linear(width, len(FLAWS) * _LEVELS)
        self.pooled = nn.Linear(2 * width, len(_DEFECT_NAMES) * _LEVELS)
        self.match = nn.Linear(width, len(MATCHES))
        self.errors = nn.Linear(width, len(ERROR_KINDS) * (MAX_ERRORS + 1))
        self.severities = nn.ModuleDict(
            {name: nn.Linear(width, len(fields) * _LEVELS) for name, fields in DEFECTS_OF.items()}
        )
        self.group = nn.Linear(width, len(GROUPS))
        self.relations = nn.Linear(width, len(RELATIONS))

    def vision_loss(self, image_btd: Tensor, data: SceneArrays, rows: IntArray) -> Tensor:
        """Token attributes and the picture's defects, from the tower's output alone."""
        pooled = torch.cat([image_btd.mean(dim=1), image_btd.amax(dim=1)], dim=-1)
        cover = torch.from_numpy(data.token_cover[rows])
        base = torch.from_numpy(data.token_base[rows])
        loss: Tensor = (
            _cross_entropy(self.colour(image_btd), data.token_colour[rows])
            + _cross_entropy(self.shape(image_btd), data.token_shape[rows])
            + _cross_entropy(self.rank(image_btd), data.token_rank[rows])
            + 5.0 * ((self.base(image_btd)[..., 0] - base).abs() * (base > 0)).mean()
            + _leveled(self.counts(pooled), data.counts[rows])
            + F.binary_cross_entropy_with_logits(self.cover(image_btd), cover)
            + _leveled(self.flaws(image_btd), data.token_flaws[rows])
            + 8.0 * _leveled(self.pooled(pooled), data.severities[rows])
        )
        return loss

    def reading_loss(
        self, answers: Answers, data: SceneArrays, rows: IntArray, which: IntArray, questions: Sequence[int]
    ) -> Tensor:
        """What the language model should have noticed: token matches, alignment errors, severities."""
        loss = _cross_entropy(self.match(answers.image_btd), data.matches[rows, which])
        for place, question in enumerate(questions):
            read, name = answers.reads_bqd[:, place], DIMENSIONS[question]
            if name in DEFECTS_OF:
                columns = [_DEFECT_NAMES.index(field) for field in DEFECTS_OF[name]]
                loss = loss + _leveled(self.severities[name](read), data.severities[rows][:, columns])
            else:
                loss = loss + _leveled(self.errors(read), data.errors[rows, which])
        return loss

    def relation_loss(
        self, answers: Answers, data: SceneArrays, rows: IntArray, which: IntArray, questions: Sequence[int]
    ) -> Tensor:
        """What a comparison of places needs: which group each token stands for, and how the two groups stand.

        Args:
            questions: among which alignment is.
        """
        group = _cross_entropy(self.group(answers.image_btd), data.token_group[rows, which])
        read = answers.reads_bqd[:, list(questions).index(DIMENSIONS.index("alignment"))]
        held = torch.from_numpy(data.relations[rows, which])
        known = held != NO_RELATION
        each = F.binary_cross_entropy_with_logits(
            self.relations(read), held.float() * known, reduction="none"
        )
        return group + (each * known).sum() / known.sum().clamp(min=1)


def score_loss(logits_bqk: Tensor, targets_bqk: Tensor) -> Tensor:
    """Cross-entropy of the bins against soft targets."""
    return -(targets_bqk * logits_bqk.log_softmax(dim=-1)).sum(dim=-1).mean()


def soft_targets(labels_bq: Tensor, annotations_bqa: Tensor, bins: Sequence[float]) -> Tensor:
    """Half the annotators' histogram, half a triangle that reaches one bin to each side of the label."""
    values = torch.tensor(bins, dtype=torch.float32)
    step = values[1] - values[0]
    triangle = (1 - (labels_bq[..., None] - values).abs() / (2 * step)).clamp(min=0)
    triangle = triangle / triangle.sum(dim=-1, keepdim=True)
    histogram = (annotations_bqa[..., None] == values).float().mean(dim=-2)
    return 0.5 * (triangle + histogram)


def _cross_entropy(logits: Tensor, classes: IntArray) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), torch.from_numpy(classes.astype(np.int64)).flatten())


def _leveled(logits: Tensor, levels: IntArray) -> Tensor:
    """Mean cross-entropy of several levelled fields, logits [..., fields · levels] and levels [..., f]."""
    return _cross_entropy(logits.unflatten(-1, (levels.shape[-1], -1)), levels)
