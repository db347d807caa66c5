"""The model as a row of blocks, of which one at a time is in memory.

Calibration and sensitivity need the activations inside a model that may be larger than the machine. Each block
(a vision block, the merger, a decoder layer) is transformers' own module, built without weights and filled from
the checkpoint when its turn comes; between blocks only the activations of the calibration batches are kept. So
memory grows with the calibration set and with one block, never with depth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5TextRotaryEmbedding,
    Qwen3_5VisionRotaryEmbedding,
)

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import CheckpointError
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Batch

VISUAL, LANGUAGE = "model.visual.", "model.language_model."
EMBEDDING, LM_HEAD = LANGUAGE + "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Block:
    """One block: `prefix` begins the names of its tensors, and `kind` is vision, merger or decoder."""

    prefix: str
    kind: str
    index: int


@dataclass(frozen=True)
class Activations:
    """What a batch carries between blocks.

    Attributes:
        batch: where it came from.
        hidden: vision: float32 [images·patches, hidden]; decoder: float32 [rows, tokens, hidden].
        arguments: keyword arguments of each coming block of this stage (rotary tables, masks, boundaries).
        valid: decoder only: bool [rows, tokens], false on padding.
    """

    batch: Batch
    hidden: Tensor
    arguments: Sequence[dict[str, Any]] = field(default_factory=tuple)
    valid: Tensor | None = None


class BlockNetwork:
    """A checkpoint as blocks, in float32.

    Args:
        checkpoint: the model; its contract and tokenizer come with it.
        encoder: prompt encoder of its contract.
        device: where blocks and activations live.
    """

    def __init__(self, checkpoint: Checkpoint, encoder: PromptEncoder, device: str = "cpu") -> None:
        self.checkpoint, self.encoder, self.device = checkpoint, encoder, torch.device(device)
        self.contract: ScoreContract = encoder.contract
        self.config: Any = Qwen3_5Config.from_dict(dict(checkpoint.config))
        self.config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._skeleton = Qwen3_5ForConditionalGeneration(self.config).eval().model
        vision: Any = self.config.vision_config
        text: Any = self.config.text_config
        self._skeleton.visual.rotary_pos_emb = Qwen3_5VisionRotaryEmbedding(vision).to(self.device)
        self._skeleton.language_model.rotary_emb = Qwen3_5TextRotaryEmbedding(text).to(self.device)
        self.blocks = (
            *(Block(f"{VISUAL}blocks.{i}.", "vision", i) for i in range(vision.depth)),
            Block(f"{VISUAL}merger.", "merger", 0),
            *(Block(f"{LANGUAGE}layers.{i}.", "decoder", i) for i in range(text.num_hidden_layers)),
        )
        self._vision_blocks = list(self._skeleton.visual.blocks)
        self._layers = list(self._skeleton.language_model.layers)
        self._merger = self._skeleton.visual.merger

    def load(self, block: Block, read: Callable[[str], np.ndarray[Any, Any]] | None = None) -> nn.Module:
        """The module of a block with its weights; `read` gives a tensor by name, or else the checkpoint does."""
        skeletons = {"vision": self._vision_blocks, "merger": [self._merger], "decoder": self._layers}
        return self._filled(skeletons[block.kind][block.index], block.prefix, read or self.checkpoint.read)

    def begin(self, batch: Batch) -> Activations:
        """Patches and positions of a batch's images: the input of the first vision block."""
        visual = self._skeleton.visual
        catcher = _Catcher()
        embedding = nn.Module()
        for name in ("patch_embed", "pos_embed"):
            setattr(embedding, name, self._once(f"{VISUAL}{name}.", getattr(visual, name)))
        original = visual.patch_embed, visual.pos_embed
        visual.patch_embed, visual.pos_embed = embedding.patch_embed, embedding.pos_embed
        visual.blocks, visual.merger = nn.ModuleList([catcher]), nn.Identity()
        try:
            grids = torch.tensor([batch.grid_thw] * (int(batch.images.max()) + 1), device=self.device)
            visual(torch.from_numpy(batch.pixel_values).to(self.device), grid_thw=grids)
        finally:
            visual.patch_embed, visual.pos_embed = original
        return Activations(batch, catcher.hidden, [catcher.arguments] * len(self._vision_blocks))

    def step(self, block: Block, module: nn.Module, state: Activations) -> Activations:
        """Run one block; after the merger, the state is the input of the first decoder layer."""
        if block.kind == "merger":
            return self._embed(state.batch, module(state.hidden))
        hidden = module(state.hidden, **state.arguments[block.index])
        return replace(state, hidden=hidden)

    def logits(self, state: Activations) -> Tensor:
        """Of the bins, for each row's question, float64 [rows, bins], from the last layer's output.

        They are divided by the temperatures already: their softmax is the answer.
        """
        rows = torch.arange(len(state.hidden), device=self.device)
        last = state.hidden[rows, torch.from_numpy(state.batch.lengths - 1).to(self.device)]
        norm = self._once(f"{LANGUAGE}norm.", self._skeleton.language_model.norm)
        logits: Tensor = norm(last).double() @ self._score_rows().T
        temperatures = torch.tensor(self.contract.temperatures, dtype=torch.float64, device=self.device)
        asked = torch.from_numpy(state.batch.dimensions).to(self.device)
        return logits / temperatures[asked, None]

    def _embed(self, batch: Batch, features: Tensor) -> Activations:
        """Place image features among the token embeddings, and let transformers work out masks and rotary."""
        unique, inverse = np.unique(batch.ids, return_inverse=True)
        rows = np.concatenate([self.checkpoint.read(EMBEDDING, int(i), int(i) + 1) for i in unique])
        table = torch.from_numpy(rows).to(self.device)
        embeddings = table[torch.from_numpy(inverse.reshape(batch.ids.shape)).to(self.device)]
        image = torch.from_numpy(batch.ids == self.encoder.image_token_id).to(self.device)
        by_image = features.view(int(batch.images.max()) + 1, -1, features.shape[-1])
        embeddings[image] = by_image[torch.from_numpy(batch.images).to(self.device)].flatten(0, 1)
        text = self._skeleton.language_model
        catchers = [_Catcher() for _ in self._layers]
        text.layers, final_norm = nn.ModuleList(catchers), text.norm
        text.norm = nn.Identity()
        try:
            positions = torch.from_numpy(batch.positions).to(self.device)
            text(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        finally:
            text.norm = final_norm
        lengths = torch.from_numpy(batch.lengths).to(self.device)
        valid = torch.arange(batch.ids.shape[1], device=self.device) < lengths[:, None]
        return Activations(batch, embeddings, [c.arguments for c in catchers], valid)

    def _score_rows(self) -> Tensor:
        if not hasattr(self, "_rows"):
            source = self.checkpoint
            tied = LM_HEAD not in source.tensors
            name = EMBEDDING if tied else LM_HEAD
            rows = [source.read(name, code, code + 1) for code in self.encoder.code_ids]
            self._rows = torch.from_numpy(np.concatenate(rows)).double().to(self.device)
        return self._rows

    def _once(self, prefix: str, skeleton: nn.Module) -> nn.Module:
        """A small module outside the blocks, filled the first time."""
        kept: dict[str, nn.Module] = self.__dict__.setdefault("_kept", {})
        if prefix not in kept:
            kept[prefix] = self._filled(skeleton, prefix, self.checkpoint.read)
        return kept[prefix]

    def _filled(self, skeleton: nn.Module, prefix: str, read: Callable[[str], Any]) -> nn.Module:
        module = copy.deepcopy(skeleton).to_empty(device=self.device)
        for name, parameter in module.named_parameters():
            values = torch.from_numpy(np.array(read(prefix + name)))
            if values.shape != parameter.shape:
                raise CheckpointError(
                    f"{self.checkpoint.path}: weight {prefix + name!r} is {list(values.shape)}, but the config "
                    f"asks for {list(parameter.shape)}"
                )
            parameter.data = values.to(self.device)
        return module.requires_grad_(False)


class _Catcher(nn.Module):
    """Stands in for a block and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states
