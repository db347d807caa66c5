"""Reasoning chains beside their data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Cli
from tests.support.training import write_chains
from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.training.chains import Chain, load_chains
from zreward.training.data import Question, TrainingSet, load_training_set
from zreward.training.rollout import Sampling
from zreward.training.write_chains import told
from zreward.training.write_chains import write_chains as write_chains_file

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
        ({"id": 99}, "id is 99, an id that no line of"),
        ({"id": [0]}, r"id is \[0\], an id that no line of"),
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


class TestWriting:
    def test_reasons_of_known_scores(
        self, cli: Cli, reasoner: Path, scenes: Path, tmp_path: Path, data: TrainingSet
    ) -> None:
        output = tmp_path / "chains.jsonl"
        result = cli(
            "data", "chains", reasoner, scenes, "-o", output, "--max-new-tokens", "24", "--per-question", "2"
        )
        assert result.returncode == 0, result.stderr
        chains = load_chains(output, data)
        assert len(chains) > 60  # of 192; the others never ended
        assert f"{len(chains)}" in result.stdout
        again = cli("data", "chains", reasoner, scenes, "-o", output)
        assert again.returncode == 2
        assert "exists; choose another name" in again.stderr

    def test_the_score_is_given_away(self, data: TrainingSet) -> None:
        question = data.questions(labelled=True)[0]
        row = told(data, question, data.contract)
        nearest = int(np.abs(np.array(data.contract.bins) - data.scores[question]).argmin())
        assert f"The answer is {data.contract.codes[nearest]}, which stands for" in row.hint

    def test_lines_without_ids(self, reference_student: Path, scenes: Path, tmp_path: Path) -> None:
        item = json.loads(scenes.read_text(encoding="utf-8").splitlines()[0])
        del item["id"]
        item["image"] = str(scenes.parent / item["image"])
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(item) + "\n", encoding="utf-8")
        with pytest.raises(UsageError, match=r"data\.jsonl, line 1: no 'id'"):
            write_chains_file(str(reference_student), path, tmp_path / "out.jsonl", Sampling(1, 16))
        assert not (tmp_path / "out.jsonl").exists()
