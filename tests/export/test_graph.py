"""The skeleton of mobius bound to a checkpoint's weights, and checkpoints that it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, ExportError
from zreward.export.graph import EMBEDDING, LM_HEAD, Graphs, graphs_from_checkpoint, head_weight
from zreward.export.weights import CheckpointTensor


def change_config(checkpoint: Path, section: str | None = None, **changes: Any) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


def change_weights(checkpoint: Path, **changes: np.ndarray | None) -> None:
    """Replace tensors by name; None removes one."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: values for name, values in tensors.items() if values is not None}, path)


def test_every_weight_is_bound_and_every_tensor_used(built_graphs: Graphs, checkpoint_path: Path) -> None:
    used = set()
    for model in (built_graphs.vision, built_graphs.decoder):
        for value in model.graph.initializers.values():
            assert value.const_value is not None, value.name
            if isinstance(value.const_value, CheckpointTensor):
                used.add(value.const_value.layout.source)
    assert used == set(Checkpoint.open(checkpoint_path).tensors)  # tied: the embedding is the head


def test_a_missing_tensor_is_named(checkpoint_copy: Path) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    change_weights(checkpoint_copy, **{name: None})
    with pytest.raises(CheckpointError, match=rf"lack the tensor '{name}'"):
        graphs_from_checkpoint(Checkpoint.open(checkpoint_copy))


def test_a_tensor_of_another_shape_is_named(checkpoint_copy: Path) -> None:
    name = "model.visual.merger.linear_fc2.weight"
    change_weights(checkpoint_copy, **{name: np.zeros((64, 100), dtype=np.float32)})
    with pytest.raises(ExportError, match=rf"'{name}' is \[64, 100\].*asks for \[64, 192\]"):
        graphs_from_checkpoint(Checkpoint.open(checkpoint_copy))


def test_a_config_that_mobius_cannot_build(checkpoint_copy: Path) -> None:
    change_config(checkpoint_copy, "text_config", num_attention_heads="many")
    with pytest.raises(ExportError, match="mobius-onnx cannot build this config"):
        graphs_from_checkpoint(Checkpoint.open(checkpoint_copy))


def test_the_head_is_the_embedding_only_where_the_config_ties_them(checkpoint_copy: Path) -> None:
    """An untied checkpoint that lost its head must not be scored with the embedding."""
    assert head_weight(Checkpoint.open(checkpoint_copy)) == EMBEDDING
    change_config(checkpoint_copy, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lack the tensor 'lm_head\.weight'"):
        head_weight(Checkpoint.open(checkpoint_copy))
    change_weights(checkpoint_copy, **{LM_HEAD: np.zeros((640, 64), dtype=np.float32)})
    assert head_weight(Checkpoint.open(checkpoint_copy)) == LM_HEAD
