"""Data sets of the methods: items, their labels per dimension, and same-prompt pairs.

The file is the project's one JSONL form (`zreward.pairs`): a prompt and an image a line, with scores, raw annotations,
both or neither, and any subset of the dimensions. Everything that can be wrong with a file is found when it is opened,
before a model is loaded: a run that dies after an hour on line 70,000 helps nobody.

Ties are kept. A pair with equal labels says that its difference is 0, which is what the paper's pairwise terms learn
from it, and what a Bradley–Terry loss cannot use.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zreward.contract import ScoreContract
from zreward.errors import ImageError, UsageError
from zreward.image_decode import check_header
from zreward.pairs import LineError, Pair, pair_from_object, parse_line, read_lines

Labelling = Literal["required", "optional"]

PAIR_KEYS = ("first", "second", "dimension")


class Question(NamedTuple):
    """One thing to be answered: an item of the data set in one dimension, both by number."""

    item: int
    dimension: int


class LabelledPair(NamedTuple):
    """Two items of one prompt that are both labelled in one dimension; equal labels included."""

    first: int
    second: int
    dimension: int


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """An opened data set under a contract.

    Attributes:
        path: the file.
        contract: what is asked.
        items: prompt, image path and annotations of each line.
        scores: float64 [items, dimensions], NaN where a dimension is not labelled.
        sha256: of the file, by which caches and logs name it.
    """

    path: Path
    contract: ScoreContract
    items: tuple[Pair, ...]
    scores: NDArray[np.float64]
    sha256: str

    def __len__(self) -> int:
        return len(self.items)

    def asked_of(self, items: Sequence[int], *, labelled: bool) -> list[Question]:
        """The questions of some items, item by item: all dimensions, or those with a label."""
        return [
            Question(item, dimension)
            for item in items
            for dimension in range(self.scores.shape[1])
            if not (labelled and np.isnan(self.scores[item, dimension]))
        ]

    def questions(self, *, labelled: bool) -> list[Question]:
        """Every item in every dimension, or in those that it has a label in."""
        return self.asked_of(range(len(self.items)), labelled=labelled)

    def pairs(self) -> list[LabelledPair]:
        """Every same-prompt pair of each dimension, in the order of the file, ties included."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(self.items):
            groups[item.prompt].append(index)
        found = []
        for members in groups.values():
            for dimension in range(self.scores.shape[1]):
                labelled = [index for index in members if not np.isnan(self.scores[index, dimension])]
                found += [LabelledPair(a, b, dimension) for a, b in itertools.combinations(labelled, 2)]
        return found

    def target(self, question: Question) -> NDArray[np.float64]:
        """The soft target over the bins, [bins]: the annotators' histogram, or the score where there is none.

        Scores between two bins are shared between them, so the target's expectation is that of the annotations
        (of the label).

        Raises:
            ValueError: the question has no label.
        """
        name = self.contract.dimension_names[question.dimension]
        histogram = self.items[question.item].annotations.get(name)
        bins = np.array(self.contract.bins)
        if histogram is None:
            return np.asarray(shares_on_bins(np.array([self.scores[question]]), bins)[0])
        shares = shares_on_bins(np.array(histogram.scores), bins)
        return np.asarray(np.array(histogram.counts) @ shares / histogram.n)


def shares_on_bins(scores: NDArray[np.float64], bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, bins]: all of a score on its bin, or shared between the two bins around it.

    Raises:
        ValueError: a score is off the scale or NaN.
    """
    if not ((scores >= bins[0]) & (scores <= bins[-1])).all():
        raise ValueError(f"scores must lie from {bins[0]:g} to {bins[-1]:g}")
    return np.stack([np.interp(scores, bins, row) for row in np.eye(len(bins))], axis=1)


def load_training_set(path: Path, contract: ScoreContract, labels: Labelling = "required") -> TrainingSet:
    """Open a data set (a folder: its `scenes.jsonl`) and check all of it.

    Args:
        labels: "required" refuses a line without a label; "optional" is for methods that need none.

    Raises:
        UsageError: there is no such file, it has no lines, or a line is malformed, names a dimension that the contract
            does not have, has a score off its scale, or an image that is missing or is no image.
    """
    if path.is_dir():
        path = path / "scenes.jsonl"
    if not path.is_file():
        raise UsageError(f"{path}: no such data set; expected JSONL with prompt, image and scores a line")
    items: list[Pair] = []
    seen: set[Path] = set()
    with path.open("rb") as stream:
        for line in read_lines(stream):
            where = f"{path}, line {line.number}"
            try:
                item = pair_from_object(parse_line(line), path.parent)
            except LineError as error:
                raise UsageError(f"{where}: {error}") from None
            _check_labels(item, contract, labels, where)
            if item.image not in seen:
                try:
                    check_header(item.image)
                except ImageError as error:
                    raise UsageError(f"{where}: {error}") from None
                seen.add(item.image)
            items.append(item)
    if not items:
        raise UsageError(f"{path}: the data set is empty")
    scores = np.array(
        [[item.scores.get(name, np.nan) for name in contract.dimension_names] for item in items]
    )
    return TrainingSet(path, contract, tuple(items), scores, _sha256(path))


def load_pairs(path: Path, data: TrainingSet) -> list[LabelledPair]:
    """Chosen pairs: JSONL with `first` and `second` (ids of the data set) and `dimension` a line.

    Raises:
        UsageError: a line is malformed, an id is unknown or not unique, the two items have different prompts or are
            one, or one of them has no label in the dimension.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file of pairs; expected JSONL with {', '.join(PAIR_KEYS)} a line")
    ids = rows_by_id(data)
    with path.open("rb") as stream:
        found = []
        for line in read_lines(stream):
            where = f"{path}, line {line.number}"
            try:
                found.append(_chosen_pair(parse_line(line), ids, data, where))
            except LineError as error:
                raise UsageError(f"{where}: {error}") from None
    if not found:
        raise UsageError(f"{path}: no pairs in it")
    return found


def rows_by_id(data: TrainingSet) -> dict[str | int, list[int]]:
    """The items that have an id, by it."""
    found: dict[str | int, list[int]] = defaultdict(list)
    for index, item in enumerate(data.items):
        if item.id is not None:
            found[item.id].append(index)
    return found


def item_of_id(value: object, rows: Mapping[str | int, list[int]], data: TrainingSet, where: str) -> int:
    """The one item with an id.

    Raises:
        UsageError: there is none, or there are several.
    """
    matching = rows.get(value, []) if isinstance(value, str | int) else []
    if len(matching) != 1:
        count = "no line" if not matching else f"{len(matching)} lines"
        raise UsageError(f"{where} is {value!r}, an id that {count} of {data.path} has")
    return matching[0]


def dimension_of_name(name: object, contract: ScoreContract, where: str) -> int:
    """The number of a dimension.

    Raises:
        UsageError: the contract does not have it.
    """
    names = contract.dimension_names
    if not isinstance(name, str) or name not in names:
        raise UsageError(f"{where}: the contract has no dimension {name!r}; it has {', '.join(names)}")
    return names.index(name)


def _check_labels(item: Pair, contract: ScoreContract, labels: Labelling, where: str) -> None:
    low, high = contract.bins[0], contract.bins[-1]
    for name in [*item.scores, *item.annotations]:
        dimension_of_name(name, contract, where)
    for name, score in item.scores.items():
        if not low <= score <= high:
            raise UsageError(
                f"{where}: the score of {name!r} is {score:g}, off the contract's scale from {low:g} to {high:g}; map "
                "the data set's scale onto it first (`zreward data convert` does so for public sets)"
            )
    for name, histogram in item.annotations.items():
        if not low <= histogram.scores[0] <= histogram.scores[-1] <= high:
            raise UsageError(f"{where}: an annotation of {name!r} is off the scale from {low:g} to {high:g}")
    if labels == "required" and not item.scores:
        raise UsageError(f"{where}: no 'scores' and no 'annotations'; this method needs labels")


def _chosen_pair(
    line: dict[str, Any], ids: dict[str | int, list[int]], data: TrainingSet, where: str
) -> LabelledPair:
    if sorted(line) != sorted(PAIR_KEYS):
        raise UsageError(
            f"{where}: expected the keys {', '.join(PAIR_KEYS)}; found {', '.join(line) or 'none'}"
        )
    rows = [item_of_id(line[key], ids, data, f"{where}: {key}") for key in ("first", "second")]
    first, second = rows
    dimension = dimension_of_name(line["dimension"], data.contract, where)
    if first == second:
        raise UsageError(f"{where}: both sides of the pair are {line['first']!r}")
    if data.items[first].prompt != data.items[second].prompt:
        raise UsageError(
            f"{where}: {line['first']!r} and {line['second']!r} have different prompts; only candidates of one prompt "
            "are compared"
        )
    for key, row in zip(("first", "second"), rows, strict=True):
        if np.isnan(data.scores[row, dimension]):
            raise UsageError(f"{where}: {line[key]!r} has no label in {line['dimension']!r}")
    return LabelledPair(first, second, dimension)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
