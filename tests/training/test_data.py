"""Training sets: what they hold, and that everything wrong with a file is found when it is opened."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.synthetic import SceneConfig, write_dataset
from zreward.training.data import (
    LabelledPair,
    Question,
    load_pairs,
    load_training_set,
    shares_on_bins,
)

CONTRACT = ScoreContract.default()
NAMES = CONTRACT.dimension_names

Write = Callable[[Sequence[Mapping[str, Any]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write lines beside an image `a.png`."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")

    def lines(items: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        return path

    return lines


def item(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "image": "a.png", "scores": {NAMES[0]: 3.5}} | changes


def test_scores_annotations_and_gaps(write: Write) -> None:
    annotations = {NAMES[1]: [1, 2, 2, 5], NAMES[2]: {"3": 1, "3.25": 1}}
    data = load_training_set(write([item(annotations=annotations), item(scores={NAMES[3]: 1.0})]), CONTRACT)
    expected = [[3.5, 2.0, 3.125, np.nan], [np.nan, np.nan, np.nan, 1.0]]
    np.testing.assert_allclose(data.scores, expected)
    assert data.questions(labelled=True) == [Question(0, 0), Question(0, 1), Question(0, 2), Question(1, 3)]
    assert len(data.questions(labelled=False)) == 8


def test_targets_are_histograms_where_there_are_any(write: Write) -> None:
    data = load_training_set(write([item(annotations={NAMES[1]: [1, 2, 2, 4.25]})]), CONTRACT)
    bins = np.array(CONTRACT.bins)
    expected = np.zeros(9)
    expected[[0, 2, 6, 7]] = [0.25, 0.5, 0.125, 0.125]
    np.testing.assert_allclose(data.target(Question(0, 1)), expected)
    np.testing.assert_allclose(data.target(Question(0, 0)), bins == 3.5)
    with pytest.raises(ValueError, match="from 1 to 5"):
        data.target(Question(0, 3))


def test_a_label_stands_over_the_aggregate(write: Write) -> None:
    """Data sets correct labels after the annotation, as the paper's re-comparison of coarse bins does."""
    data = load_training_set(write([item(annotations={NAMES[0]: [1, 2, 3]})]), CONTRACT)
    assert data.scores[0, 0] == 3.5


def test_shares_keep_the_expectation() -> None:
    bins = np.array(CONTRACT.bins)
    scores = np.linspace(1, 5, 37)
    shares = shares_on_bins(scores, bins)
    np.testing.assert_allclose(shares @ bins, scores)
    np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_pairs_are_all_of_a_prompt_with_ties(tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", SceneConfig(size=48), seed=0, n_prompts=4, candidates=3)
    data = load_training_set(tmp_path / "scenes", CONTRACT)
    expected = {
        LabelledPair(a, b, d)
        for a, b in itertools.combinations(range(len(data)), 2)
        for d in range(4)
        if data.items[a].prompt == data.items[b].prompt
    }
    pairs = data.pairs()
    assert set(pairs) == expected
    assert len(pairs) == len(expected) >= 4 * 3 * 4
    assert any(data.scores[p.first, p.dimension] == data.scores[p.second, p.dimension] for p in pairs)


def test_missing_dimensions_make_no_pairs(write: Write) -> None:
    data = load_training_set(write([item(), item(scores={NAMES[1]: 2.0}), item(prompt="a dog")]), CONTRACT)
    assert data.pairs() == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (item(scores={"beauty": 3.0}), r"no dimension 'beauty'; it has alignment"),
        (item(annotations={"beauty": [3.0]}), r"no dimension 'beauty'"),
        (item(scores={NAMES[0]: 7.5}), r"'alignment' is 7.5, off the contract's scale from 1 to 5"),
        (item(scores={NAMES[0]: 0}), r"off the contract's scale"),
        (item(annotations={NAMES[0]: [2, 9]}), r"annotation of 'alignment' is off"),
        (item(annotations={NAMES[0]: []}), r"nobody gave a score"),
        (item(annotations=[3]), r"'annotations' must be an object"),
        (item(scores={}), r"needs labels"),
        (item(scores={NAMES[0]: float("nan")}), r"NaN"),
        (item(image="b.png"), r"b\.png: no such file"),
        (item(image="data.jsonl"), r"not an image"),
        (item(image="."), r"no such file"),
        (item(label=3), r"unknown key 'label'"),
        ({"prompt": "a cat"}, r"'image' is missing"),
    ],
)
def test_a_broken_line_is_named_before_any_work(write: Write, broken: dict[str, Any], message: str) -> None:
    path = write([item(), broken])
    with pytest.raises(UsageError, match=rf"data\.jsonl, line 2: .*{message}"):
        load_training_set(path, CONTRACT)


def test_labels_may_be_optional(write: Write) -> None:
    data = load_training_set(write([{"prompt": "a cat", "image": "a.png"}]), CONTRACT, labels="optional")
    assert np.isnan(data.scores).all()
    assert data.questions(labelled=True) == []
    assert len(data.questions(labelled=False)) == 4


def test_an_empty_or_missing_set(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        load_training_set(write([]), CONTRACT)
    with pytest.raises(UsageError, match="no such data set"):
        load_training_set(tmp_path / "none.jsonl", CONTRACT)


class TestChosenPairs:
    @pytest.fixture
    def chosen(self, write: Write, tmp_path: Path) -> Callable[..., list[LabelledPair]]:
        lines = [item(id="x"), item(id="y"), item(id=3, prompt="a dog"), item(id="z", scores={NAMES[1]: 2.0})]
        data = load_training_set(write([*lines, item(id="twice"), item(id="twice")]), CONTRACT)

        def load(*pairs: Any) -> list[LabelledPair]:
            path = tmp_path / "pairs.jsonl"
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
            return load_pairs(path, data)

        return load

    def test_by_id(self, chosen: Callable[..., list[LabelledPair]]) -> None:
        assert chosen({"first": "y", "second": "x", "dimension": NAMES[0]}) == [LabelledPair(1, 0, 0)]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"second": 3}, "different prompts; only candidates of one prompt"),
            ({"second": "x"}, "both sides of the pair are 'x'"),
            ({"second": "w"}, "an id that no line of"),
            ({"second": None}, "an id that no line of"),
            ({"second": "twice"}, "an id that 2 lines of"),
            ({"second": "z"}, "'z' has no label in 'alignment'"),
            ({"dimension": "beauty"}, "no dimension 'beauty'"),
            ({"margin": 1}, "expected the keys first, second, dimension"),
        ],
    )
    def test_refused(
        self, chosen: Callable[..., list[LabelledPair]], changes: dict[str, Any], message: str
    ) -> None:
        good = {"first": "x", "second": "y", "dimension": NAMES[0]}
        with pytest.raises(UsageError, match=rf"pairs\.jsonl, line 2: .*{message}"):
            chosen(good, good | changes)

    def test_empty(self, chosen: Callable[..., list[LabelledPair]]) -> None:
        with pytest.raises(UsageError, match="no pairs"):
            chosen()
