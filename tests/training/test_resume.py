"""A run that is killed and started again ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.training import config_text
from zreward.errors import CheckpointError, UsageError
from zreward.training import gdso, sft
from zreward.training.config import load_config
from zreward.training.state import latest_state

STEPS, KILLS = 24, 10


def write_config(folder: Path, checkpoint: Path, scenes: Path, name: str, **options: str) -> Path:
    text = config_text(
        checkpoint,
        scenes,
        folder / name,
        steps=STEPS,
        run=options.get("run", ""),
        model=options.get("model", ""),
    ).replace("save_every = 0", "save_every = 1")
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_of(log: Path) -> list[int]:
    lines = log.read_text(encoding="utf-8").splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["event"] == "step"]


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_bits(
    tiny_checkpoint: Path, scenes: Path, tmp_path: Path
) -> None:
    """One run undisturbed, one killed ten times at random moments while it trains and saves."""
    sft.train(load_config(write_config(tmp_path, tiny_checkpoint, scenes, "whole")))
    config = write_config(tmp_path, tiny_checkpoint, scenes, "killed")
    rng = random.Random(0)
    kills = 0
    seen = -1
    while not (tmp_path / "killed" / "model").exists():
        process = commands.start("train", "sft", "--config", config)
        while process.exitcode is None and kills < KILLS:
            state = latest_state(tmp_path / "killed")
            step = int(state.name.removeprefix("step-")) if state else 0
            if step > seen:  # it has come further than when it was killed last
                seen = step
                time.sleep(rng.uniform(0, 0.15))
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        process.join()
    assert kills == KILLS
    for name in ("model.safetensors", "config.json", "contract.json"):
        assert digest(tmp_path / "killed" / "model" / name) == digest(tmp_path / "whole" / "model" / name)
    assert steps_of(tmp_path / "killed" / "log.jsonl") == list(range(1, STEPS + 1))


class TestAnotherConfig:
    @pytest.fixture
    def stopped(self, reference_student: Path, scenes: Path, tmp_path: Path) -> Path:
        """A finished run whose model was taken away, as if it had been killed before it was written."""
        sft.train(load_config(write_config(tmp_path, reference_student, scenes, "run")))
        shutil.rmtree(tmp_path / "run" / "model")
        return tmp_path

    def test_is_refused_unless_no_weight_depends_on_the_change(
        self, stopped: Path, reference_student: Path, scenes: Path
    ) -> None:
        config = (stopped / "run.toml").read_text(encoding="utf-8")
        changed = stopped / "changed.toml"
        changed.write_text(config.replace("learning_rate = 1e-3", "learning_rate = 2e-3"), encoding="utf-8")
        with pytest.raises(UsageError, match=r"another config \(optimizer\.learning_rate differs\)"):
            sft.train(load_config(changed))
        changed.write_text(config.replace("log_every = 1", "log_every = 4"), encoding="utf-8")
        sft.train(load_config(changed))
        assert (stopped / "run" / "model" / "model.safetensors").is_file()
        with pytest.raises(UsageError, match="holds a finished run"):
            sft.train(load_config(changed))

    def test_a_damaged_state_is_named(self, stopped: Path) -> None:
        state = latest_state(stopped / "run")
        assert state is not None
        weights = state / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"damaged .* the run goes on from the state before it"):
            sft.train(load_config(stopped / "run.toml"))
        shutil.rmtree(state)
        sft.train(load_config(stopped / "run.toml"))


def test_a_foreign_folder_is_left_alone(reference_student: Path, scenes: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, reference_student, scenes, "photos")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        sft.train(load_config(config))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_a_checkpoint_is_not_taken_for_a_run(reference_student: Path, scenes: Path, tmp_path: Path) -> None:
    """Its config.json must survive somebody who trains "in place"."""
    copy = tmp_path / "student"
    shutil.copytree(reference_student, copy)
    before = {path.name: digest(path) for path in copy.iterdir()}
    config = write_config(tmp_path, copy, scenes, "student")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        sft.train(load_config(config))
    assert {path.name: digest(path) for path in copy.iterdir()} == before


@pytest.mark.slow
def test_a_reference_and_its_samples_are_the_same_after_a_stop(
    reasoner: Path, scenes: Path, tmp_path: Path
) -> None:
    """GDSO that goes on between two renewals of π_ref: it is read from the state, and sampling has no memory."""
    method = "beta = 0.1\nreference_every = 4\n[method.sampling]\ngroup_size = 2\nmax_new_tokens = 12"
    config = tmp_path / "gdso.toml"
    text = config_text(reasoner, scenes, tmp_path / "run", steps=3, batch_size=1, method=method)
    config.write_text(text.replace("save_every = 0", "save_every = 1"), encoding="utf-8")
    gdso.train(load_config(config))
    model = tmp_path / "run" / "model"
    whole = digest(model / "model.safetensors")
    shutil.rmtree(model)
    latest = latest_state(tmp_path / "run")
    assert latest is not None and latest.name == "step-00000002"
    assert (latest / "extra.safetensors").is_file()
    shutil.rmtree(latest)
    gdso.train(load_config(config))
    assert digest(model / "model.safetensors") == whole
