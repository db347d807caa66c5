"""The reference student's shape, contract, tokenizer and configuration.

Everything that a checkpoint directory holds beside the weights is made here. The weights are trained by
`zreward.training.reference_student` through `zreward.training.reference_forward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3_5Config

from zreward.contract import Dimension, ScoreContract
from zreward.image import ImageSpec

PATCH, MERGE = 12, 2
TOKEN_SIDE = PATCH * MERGE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
THINK_TOKENS = ("<think>", "</think>")
"""Added but not special, as in Qwen: they are text that decoding keeps."""

# Qwen's split: words, single digits, punctuation, line breaks and spaces apart.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_RUBRICS = (
    ("alignment", "Alignment", "fits the prompt"),
    ("realism", "Realism", "no artifacts"),
    ("aesthetics", "Aesthetics", "calm, tidy, level"),
    ("plausibility", "Plausibility", "could stand there"),
)


@dataclass(frozen=True)
class StudentShape:
    """Sizes of the student; the defaults are the shipped one.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, ffn: of the language model; every `full_every`-th layer
            is full attention and the others are Gated DeltaNet.
        linear_heads, linear_dim: heads and head width of Gated DeltaNet.
        vision_hidden, vision_layers, vision_heads, vision_ffn: of the vision tower.
        image_size: side of the training images in pixels, a multiple of 24.
        vocabulary: upper bound of the tokenizer's size.
    """

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 48
    ffn: int = 512
    full_every: int = 4
    linear_heads: int = 4
    linear_dim: int = 48
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_ffn: int = 384
    image_size: int = 120
    vocabulary: int = 1024


def reference_contract(image_size: int) -> ScoreContract:
    """Four one-line rubrics, short questions, and an image budget around `image_size`."""
    area = image_size * image_size
    image = ImageSpec(
        patch_size=PATCH,
        merge_size=MERGE,
        min_pixels=4 * TOKEN_SIDE * TOKEN_SIDE,
        max_pixels=4 * area,
    )
    dimensions = tuple(
        Dimension(name=name, title=title, rubric=rubric, question=f"{title}?")
        for name, title, rubric in _RUBRICS
    )
    return replace(
        ScoreContract.default(image),
        name="zreward-reference-student",
        instruction="Rate 1 to 9.",
        dimensions=dimensions,
        max_prompt_tokens=64,
    )


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer with single digits and Qwen's chat and vision markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' fast tokenizer."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(directory)


def student_config(shape: StudentShape, tokenizer: Tokenizer) -> Qwen3_5Config:
    """The configuration of a student whose ids are those of `tokenizer`."""
    ids = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    grid = shape.image_size // PATCH
    text: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "full_attention_interval": shape.full_every,
        "linear_num_key_heads": shape.linear_heads,
        "linear_num_value_heads": shape.linear_heads,
        "linear_key_head_dim": shape.linear_dim,
        "linear_value_head_dim": shape.linear_dim,
        "max_position_embeddings": 2048,
        "initializer_range": 0.04,  # 0.02 suits widths of thousands
        "tie_word_embeddings": True,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "rope_parameters": _rope(shape.head_dim),
    }
    vision: dict[str, Any] = {
        "depth": shape.vision_layers,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_ffn,
        "num_heads": shape.vision_heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": grid * grid,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _rope(head_dim: int) -> dict[str, Any]:
    """Half of each head is rotated; the rotary pairs are shared out to time, height and width."""
    pairs = head_dim // 4
    height = width = pairs // 3
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [pairs - height - width, height, width],
        "mrope_interleaved": True,
    }
