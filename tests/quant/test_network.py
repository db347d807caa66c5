"""The blocks one at a time must be the model that transformers runs in one piece."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Item, batches
from zreward.quant.network import BlockNetwork
from zreward.reference import ReferenceModel


def run(network: BlockNetwork, items: list[Item], encoder: PromptEncoder) -> np.ndarray:
    answers = np.zeros((len(items), len(encoder.contract.dimensions), len(encoder.contract.bins)))
    with torch.inference_mode():
        states = [network.begin(b) for b in batches(items, encoder.contract, encoder, all_questions=True)]
        for block in network.blocks:
            module = network.load(block)
            states = [network.step(block, module, state) for state in states]
        for state in states:
            answers[state.batch.indices, state.batch.dimensions] = network.logits(state).softmax(-1).numpy()
    return answers


def test_blocks_give_what_transformers_gives(
    checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item]
) -> None:
    wide = dataclasses.replace(items[0], image=np.full((40, 90, 3), 90, np.uint8))  # a batch of its own
    mixed = [*items[:3], wide]
    with ReferenceModel(checkpoint.path) as reference:
        expected = np.stack([reference.probabilities(item.prompt, item.image) for item in mixed])
    found = run(BlockNetwork(checkpoint, encoder), mixed, encoder)
    assert np.abs(found - expected).max() < 1e-5


def test_blocks_are_in_the_order_of_the_model(checkpoint: Checkpoint, encoder: PromptEncoder) -> None:
    kinds = [block.kind for block in BlockNetwork(checkpoint, encoder).blocks]
    assert kinds == ["vision"] * 2 + ["merger"] + ["decoder"] * 4


def test_a_weight_of_another_shape_is_an_error(checkpoint: Checkpoint, encoder: PromptEncoder) -> None:
    network = BlockNetwork(checkpoint, encoder)
    with pytest.raises(CheckpointError, match=r"norm1\.weight.*config"):
        network.load(network.blocks[0], lambda name: np.zeros((3, 5), np.float32))


def test_padding_is_marked(checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item]) -> None:
    longer = dataclasses.replace(items[0], prompt="a rather longer prompt about one red cube and a blue ball")
    (batch,) = batches([items[0], longer], encoder.contract, encoder)
    network = BlockNetwork(checkpoint, encoder)
    with torch.inference_mode():
        state = network.begin(batch)
        for block in network.blocks[:3]:
            state = network.step(block, network.load(block), state)
    assert state.valid is not None
    assert state.valid.sum(1).tolist() == batch.lengths.tolist()
    assert not bool(state.valid.all())


def test_missing_checkpoint_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "nowhere")
