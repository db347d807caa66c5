"""Random Qwen3.5 checkpoints of any shape, with tokenizer and contract, for parity and robustness tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from zreward.contract import ScoreContract
from zreward.image import ImageSpec
from zreward.training.reference_model import SPECIAL_TOKENS, train_tokenizer

VOCABULARY = 640


@dataclass(frozen=True)
class Shape:
    """The dimensions that a parity test varies; defaults are small and ordinary."""

    hidden: int = 64
    layers: int = 4
    full_attention_interval: int = 4
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    partial_rotary: float = 0.25
    linear_heads: tuple[int, int] = (2, 4)
    linear_dims: tuple[int, int] = (16, 16)
    vision_hidden: int = 48
    vision_depth: int = 2
    vision_heads: int = 4
    patch: int = 8
    position_grid: int = 8
    tied: bool = True


def small_contract(patch: int) -> ScoreContract:
    """The default contract with a budget of 4 to 40 tokens and temperatures that differ."""
    side = 2 * patch
    spec = ImageSpec(patch_size=patch, min_pixels=4 * side * side, max_pixels=40 * side * side)
    contract = ScoreContract.default(spec)
    dimensions = tuple(
        dataclasses.replace(d, temperature=1.0 + 0.25 * index) for index, d in enumerate(contract.dimensions)
    )
    return dataclasses.replace(contract, dimensions=dimensions, max_prompt_tokens=256)


def write_checkpoint(
    path: Path, shape: Shape | None = None, *, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Save a random checkpoint of `shape` at `path`; weights are large enough to make answers differ."""
    shape = shape or Shape()
    tokenizer = small_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration(_config(shape, tokenizer)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize(name, parameter)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    small_contract(shape.patch).save(path)
    return path


def _randomize(name: str, parameter: torch.Tensor) -> None:
    """Weights near the scale of a trained model, so that every path matters in the output."""
    if parameter.ndim >= 2:
        fan_in = parameter[0].numel()
        spread = 1.0 if "embed" in name else 1.2 / fan_in**0.5
        parameter.normal_(0.0, spread)
    elif name.endswith(("A_log", "dt_bias")):
        parameter.uniform_(-1.0, 1.0)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.1)


def _config(shape: Shape, tokenizer: Tokenizer) -> Qwen3_5Config:
    rotary_half = int(shape.head_dim * shape.partial_rotary) // 2
    sections = [rotary_half - 2 * (rotary_half // 3), rotary_half // 3, rotary_half // 3]
    text: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": 2 * shape.hidden,
        "num_attention_heads": shape.heads[0],
        "num_key_value_heads": shape.heads[1],
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.linear_heads[0],
        "linear_num_value_heads": shape.linear_heads[1],
        "linear_key_head_dim": shape.linear_dims[0],
        "linear_value_head_dim": shape.linear_dims[1],
        "vocab_size": VOCABULARY,
        "full_attention_interval": shape.full_attention_interval,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": shape.partial_rotary,
            "mrope_section": sections,
            "mrope_interleaved": True,
        },
    }
    vision: dict[str, Any] = {
        "hidden_size": shape.vision_hidden,
        "depth": shape.vision_depth,
        "intermediate_size": 2 * shape.vision_hidden,
        "num_heads": shape.vision_heads,
        "patch_size": shape.patch,
        "spatial_merge_size": 2,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": shape.position_grid**2,
        "deepstack_visual_indexes": [],
    }
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of at most 512 tokens with Qwen's markers and single digits."""
    return train_tokenizer([ScoreContract.default().system_text], vocabulary=512)
