"""Reasoning chains beside their data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import write_chains
from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.training.chains import Chain, load_chains
from zreward.training.data import Question, TrainingSet, load_training_set

GOOD = {"id": 0, "dimension": "realism", "chain": " a sharp red ball "}


@pytest.fixture
def data(scenes: Path, reference_student: Path) -> TrainingSet:
    return load_training_set(scenes, ScoreContract.load(reference_student))


@pytest.fixture
def load(data: TrainingSet, tmp_path: Path) -> Callable[..., list[Chain]]:
    def chains(*lines: Any) -> list[Chain]:
        path = tmp_path / "chains.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return load_chains(path, data)

    return chains


def test_chains_of_a_question(load: Callable[..., list[Chain]]) -> None:
    assert load(GOOD, GOOD) == [Chain(Question(0, 1), "a sharp red ball")] * 2


def test_one_for_every_label(data: TrainingSet, scenes: Path, tmp_path: Path) -> None:
    chains = load_chains(write_chains(tmp_path / "all.jsonl", scenes), data)
    assert [chain.question for chain in chains] == data.questions(labelled=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 99}, "id is 99, which no line of"),
        ({"id": [0]}, r"id is \[0\], which no line of"),
        ({"dimension": "beauty"}, "no dimension 'beauty'; it has alignment, realism"),
        ({"chain": " "}, "must be a text that is not empty"),
        ({"chain": 3}, "must be a text that is not empty"),
        ({"chain": "so </think> 9"}, "holds '</think>', which ends a trace"),
        ({"score": 3}, "expected the keys id, dimension, chain"),
    ],
)
def test_refused(load: Callable[..., list[Chain]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"chains\.jsonl, line 2: .*{message}"):
        load(GOOD, GOOD | changes)


def test_none(load: Callable[..., list[Chain]], data: TrainingSet, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chains in it"):
        load()
    with pytest.raises(UsageError, match="no such file of chains"):
        load_chains(tmp_path / "none.jsonl", data)
