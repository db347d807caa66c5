"""The config of a run: strict, with paths from its own folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import config_text
from zreward.errors import UsageError
from zreward.training import gdso, grpo, opd, rewarddance, risd, sft
from zreward.training.config import OptimizerConfig, load_config
from zreward.training.optimize import learning_rate


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


MINIMAL = """
[data]
train = "data/train.jsonl"
[model]
checkpoint = "../student"
[run]
output = "runs/new"
steps = 10
"""


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    config = load_config(write(folder, MINIMAL + '[method]\nteacher = "../teacher"\n'))
    assert config.data.train == str(folder / "data" / "train.jsonl")
    assert config.model.checkpoint == str(tmp_path / "student")
    assert config.run.output == str(folder / "runs" / "new")
    assert config.method["teacher"] == str(tmp_path / "teacher")


def test_a_name_on_the_hub_stays_one(tmp_path: Path) -> None:
    text = MINIMAL.replace("../student", "Qwen/Qwen3.5-9B")
    assert load_config(write(tmp_path, text)).model.checkpoint == "Qwen/Qwen3.5-9B"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 10", "", r"run: field 'steps' is missing"),
        ("steps = 10", "steps = 0", r"run\.steps must be at least 1, not 0"),
        ("steps = 10", "steps = 1.5", r"run: steps: expected an integer"),
        ("steps = 10", "steps = 10\nstep = 3", r"run: unknown field 'step'; known are output, steps"),
        ("[run]", "[running]", r"section \[run\] is missing; known are data, model"),
        ("[run]", "[extra]\na = 1\n[run]", r"unknown field 'extra'"),
        ("[run]", "[optimizer]\nname = 'sgd'\n[run]", r"optimizer\.name must be one of 'adamw', 'adamw8bit'"),
        ("[run]", "[optimizer]\nbetas = [0.9]\n[run]", r"optimizer\.betas must be two numbers"),
        ("[run]", "[optimizer]\nlearning_rate = nan\n[run]", r"optimizer\.learning_rate must be from 0"),
        ("[run]", "quantize = 'nf4'\n[run]", r"so it needs model\.lora_rank > 0"),
        ("[run]", "quantize = 'nf3'\n[run]", r"model\.quantize must be one of 'nf4', 'int8'"),
        ("[run]", "precision = 'fp16'\n[run]", r"model\.precision must be one of"),
        ("[run]", "[run", r"not TOML"),
        ('train = "data/train.jsonl"', "train = 3", r"data: train: expected a string"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, MINIMAL.replace(old, new)))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: no such config"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        (sft.Options, "soft_target = true", "unknown field 'soft_target'; known are soft_targets"),
        (risd.Options, "", "field 'teacher' is missing"),
        (opd.Options, "", "field 'teacher' is missing"),
        (rewarddance.Options, "", "method.chains is missing"),
        (rewarddance.Options, 'form = "no"', 'must be "chains" or "yes"'),
        (gdso.Options, "pairwise_loss = -1", "pairwise_loss must not be negative"),
        (grpo.Options, "pairwise_loss = 1", "unknown field 'pairwise_loss'"),
        (grpo.Options, 'reward_from = "text"', 'must be "expectation" or "parsed"'),
        (grpo.Options, "updates = 0", "updates must be at least 1"),
        (gdso.Options, "[method.sampling]\ngroup_size = 0", "group_size of at least 1"),
        (gdso.Options, "[method.sampling]\ngroups = 4", "unknown field 'groups'"),
    ],
)
def test_mistakes_in_the_method(tmp_path: Path, kind: type, method: str, message: str) -> None:
    text = config_text(tmp_path, tmp_path, tmp_path / "run", steps=1, method=method)
    with pytest.raises(UsageError, match=message):
        load_config(write(tmp_path, text)).method_options(kind)


class TestSchedule:
    def test_warm_up_is_linear(self) -> None:
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
        assert [learning_rate(config, step, 10) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]

    @pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
    def test_after_it(self, schedule: str, middle: float) -> None:
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule=schedule)
        rates = [learning_rate(config, step, 100) for step in range(101)]
        assert rates[0] == 1.0
        assert rates[50] == pytest.approx(middle)
        assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.0)
        assert rates == sorted(rates, reverse=True)
