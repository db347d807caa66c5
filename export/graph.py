"""The skeleton: mobius-onnx builds the graphs from the config, and every weight is bound lazily.

mobius constructs three graphs without tracing. Two are used: the vision tower and the decoder. The
third, the token embedding, is a table lookup that the runtime does on a memory-mapped file.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import onnx_ir as ir

from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError
from zreward.export.weights import CheckpointTensor, Layout

EMBEDDING = "model.language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_VISION_RENAMES = {".mlp.up_proj.": ".mlp.linear_fc1.", ".mlp.down_proj.": ".mlp.linear_fc2."}


@dataclass(frozen=True)
class Graphs:
    """The two graphs of one model, weights bound to the checkpoint and not yet read."""

    vision: ir.Model
    decoder: ir.Model


def graphs_from_checkpoint(checkpoint: Checkpoint) -> Graphs:
    """Build vision tower and decoder for `checkpoint`.

    Raises:
        CheckpointError: a weight is missing.
        ExportError: mobius refuses the config, or a weight has another shape than the config says.
    """
    import mobius

    logging.getLogger("mobius").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = mobius.build(
                str(checkpoint.path), dtype="f32", load_weights=False, execution_provider="default"
            )
    except Exception as error:  # whatever a config can trip in the builder
        raise ExportError(
            f"{checkpoint.path}: mobius-onnx cannot build this config ({type(error).__name__}: {error})"
        ) from error
    graphs = Graphs(vision=package["vision_encoder"], decoder=package["decoder"])
    _bind(graphs.vision, checkpoint)
    _bind(graphs.decoder, checkpoint)
    return graphs


def head_weight(checkpoint: Checkpoint) -> str:
    """The tensor that holds the rows of the language head: its own, or the embedding if the two are tied."""
    tied = checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings"))
    if LM_HEAD not in checkpoint.tensors and tied:
        return EMBEDDING
    return checkpoint.info(LM_HEAD).name


def _bind(model: ir.Model, checkpoint: Checkpoint) -> None:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        source = _source_name(name, checkpoint)
        expected, found = tuple(ir.Shape(value.shape or ()).numpy()), checkpoint.info(source).shape
        if expected != found:
            raise ExportError(
                f"{checkpoint.path}: weight {source!r} is {list(found)}, but the config asks for {list(expected)}"
            )
        value.const_value = CheckpointTensor(checkpoint, Layout(source), name)


def _source_name(initializer: str, checkpoint: Checkpoint) -> str:
    """The checkpoint's name of a mobius initializer."""
    if initializer == "decoder.lm_head.weight":
        return head_weight(checkpoint)
    if initializer.startswith("decoder.model."):
        return "model.language_model." + initializer.removeprefix("decoder.model.")
    if initializer.startswith("vision_encoder.visual."):
        name = "model.visual." + initializer.removeprefix("vision_encoder.visual.")
        for ours, theirs in _VISION_RENAMES.items():
            if ".blocks." in name:
                name = name.replace(ours, theirs)
        return name
    raise ExportError(
        f"no rule binds the graph's weight {initializer!r}; mobius-onnx may have changed its names"
    )
