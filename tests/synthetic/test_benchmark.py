"""The splits of the synthetic rubric benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.synthetic import SceneConfig
from zreward.synthetic.benchmark import SPLITS, write_benchmark
from zreward.training.chains import load_chains
from zreward.training.data import Question, load_training_set

CONTRACT = ScoreContract.default()


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("benchmark") / "data"
    write_benchmark(directory, SceneConfig(size=48), scale=0.02)
    return directory


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_labels_are_where_they_belong(benchmark: Path) -> None:
    for name, split in SPLITS.items():
        data = load_training_set(benchmark / name, CONTRACT, "required" if split.labelled else "optional")
        n_images = max(2, round(0.02 * split.prompts)) * split.candidates
        assert len(data) == n_images * (1 + split.other_prompts)
        assert len({item.image for item in data.items}) == n_images
        assert bool(data.questions(labelled=True)) == split.labelled
        if split.labelled:
            assert {histogram.n for item in data.items for histogram in item.annotations.values()} == {
                split.panel["annotators"]
            }


def test_no_prompt_scene_is_in_two_splits(benchmark: Path) -> None:
    pictures = [path.read_bytes() for name in SPLITS for path in (benchmark / name / "images").iterdir()]
    assert len(set(pictures)) == len(pictures)


def test_chains_belong_to_their_questions(benchmark: Path) -> None:
    for name in ("pretrain", "opinions", "train"):
        data = load_training_set(benchmark / name, CONTRACT, "optional")
        chains = load_chains(benchmark / name / "chains.jsonl", data)
        lines = 1 + SPLITS[name].other_prompts
        own = [question for question in data.questions(labelled=False) if question.item % lines == 0]
        others = [Question(item, 0) for item in range(len(data)) if item % lines]
        assert [chain.question for chain in chains] == sorted([*own, *others])


def test_alignment_is_described_under_each_prompt(benchmark: Path) -> None:
    """The counts at the end of a chain are the errors that the truth has for the line's own prompt."""
    truths = [json.loads(line) for line in (benchmark / "pretrain" / "truth.jsonl").open(encoding="utf-8")]
    data = load_training_set(benchmark / "pretrain", CONTRACT, "optional")
    chains = [
        c for c in load_chains(benchmark / "pretrain" / "chains.jsonl", data) if c.question.dimension == 0
    ]
    assert len(chains) == len(data)
    for chain in chains:
        errors = truths[chain.question.item]["alignment_errors"]
        told = [int(word) for word in chain.text.split() if word.isdigit()]
        assert told == [min(3, errors[kind]) for kind in ("attributes", "missing", "extra", "relation")]


def test_an_image_stands_under_other_prompts_too(benchmark: Path) -> None:
    data = load_training_set(benchmark / "pretrain", CONTRACT, "optional")
    prompts = [{item.prompt for item in data.items[start : start + 4]} for start in range(0, len(data), 4)]
    assert sum(len(texts) > 2 for texts in prompts) > 0.9 * len(prompts)


def test_what_made_it_is_recorded(benchmark: Path) -> None:
    record = json.loads((benchmark / "benchmark.json").read_text(encoding="utf-8"))
    assert record["generator_version"] == 1
    assert record["splits"]["test"]["seed"] == SPLITS["test"].seed
    assert SceneConfig.from_dict(record["splits"]["train"]["config"]).annotators == 3


def test_bad_calls(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not an empty directory"):
        write_benchmark(tmp_path)
    with pytest.raises(UsageError, match="scale"):
        write_benchmark(tmp_path / "new", scale=0)
    assert not (tmp_path / "new").exists()
