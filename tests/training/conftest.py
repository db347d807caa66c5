"""Small data sets and models of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.training import SCENE_SIZE, config_text, write_chains
from zreward.synthetic import SceneConfig, write_dataset
from zreward.training import rewarddance
from zreward.training.config import ModelConfig, load_config
from zreward.training.model import RewardModel, load_model


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts with three candidates each, every line with an id."""
    directory = tmp_path_factory.mktemp("training") / "scenes"
    return write_dataset(directory, SceneConfig(size=SCENE_SIZE), seed=5, n_prompts=8, candidates=3)


@pytest.fixture(scope="session")
def one_prompt(scenes: Path) -> Path:
    """The three candidates of the first prompt: few enough to be learned by heart in a dozen steps."""
    path = scenes.parent / "one-prompt.jsonl"
    path.write_text(
        "".join(scenes.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def student_model(reference_student: Path) -> RewardModel:
    """The reference student as training sees it; tests must not change its weights."""
    return load_model(ModelConfig(str(reference_student)), torch.device("cpu"))


@pytest.fixture(scope="session")
def reasoner(tmp_path_factory: pytest.TempPathFactory, reference_student: Path, scenes: Path) -> Path:
    """The reference student after a short SFT on two-word chains: it reasons and then answers, mostly."""
    folder = tmp_path_factory.mktemp("reasoner")
    write_chains(folder / "chains.jsonl", scenes)
    method = f'chains = "{folder / "chains.jsonl"}"\nmax_new_tokens = 16'
    config = folder / "config.toml"
    config.write_text(
        config_text(
            reference_student, scenes, folder / "run", steps=70, batch_size=3, method=method, micro_batch=32
        )
    )
    rewarddance.train(load_config(config))
    return folder / "run" / "model"
