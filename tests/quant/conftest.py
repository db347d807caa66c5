"""A tiny checkpoint, opened, with a few scenes to calibrate on."""

from __future__ import annotations

from pathlib import Path

import pytest

from zreward.checkpoint import Checkpoint
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.quant.calibrate import Item, scene_items


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="session")
def encoder(checkpoint: Checkpoint) -> PromptEncoder:
    return PromptEncoder(checkpoint.contract(), load_tokenizer(checkpoint.path))


@pytest.fixture(scope="session")
def items() -> list[Item]:
    return scene_items(11, n_prompts=4, candidates=2)
