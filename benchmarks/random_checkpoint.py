"""Write a Qwen3.5 checkpoint of a real shape with random weights, for speed and memory measurements.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B

Weights are bfloat16 in safetensors shards of at most 2 GB, written one shard at a time, so that a 9B
checkpoint needs 2 GB of memory and 19 GB of disk. The shapes are those of the published models, for 4B about that
size; the tokenizer is a byte-level BPE trained on the rubric texts, because only its ids have to fit the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.training.reference_model import train_tokenizer

SHARD_BYTES = 2_000_000_000
VOCABULARY = 248_320

# Only what differs between the sizes; everything else is the default of Qwen3_5Config, which is the 9B.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "0.8B": (
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "intermediate_size": 3584,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
        {
            "hidden_size": 768,
            "depth": 12,
            "intermediate_size": 3072,
            "num_heads": 12,
            "out_hidden_size": 1024,
        },
        True,
    ),
    "4B": (
        {"hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 9216},
        {
            "hidden_size": 1024,
            "depth": 24,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
        },
        True,
    ),
    "9B": ({}, {"hidden_size": 1152, "depth": 27, "out_hidden_size": 4096}, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="0.8B")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path: Path = arguments.output
    path.mkdir(parents=True, exist_ok=True)
    contract = ScoreContract.default()
    texts = [contract.system_text, *(d.question for d in contract.dimensions)]
    tokenizer = train_tokenizer(texts, vocabulary=4096)
    tokenizer.save(str(path / "tokenizer.json"))
    config = make_config(arguments.shape, tokenizer)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(path)
    write_weights(config, path, arguments.seed)
    checkpoint = Checkpoint.open(path)
    ScoreContract.default(checkpoint.default_image_spec()).save(path)
    print(f"{path}: {checkpoint.n_parameters / 1e6:,.0f} M parameters")


def make_config(shape: str, tokenizer: Tokenizer) -> Qwen3_5Config:
    text, vision, tied = SHAPES[shape]
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    return Qwen3_5Config(
        text_config={**text, "vocab_size": VOCABULARY, "rope_parameters": rope, "tie_word_embeddings": tied},
        vision_config={**vision, "patch_size": 16, "deepstack_visual_indexes": []},
        tie_word_embeddings=tied,
        image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
    )


def write_weights(config: Qwen3_5Config, path: Path, seed: int) -> None:
    """Write every parameter of the model that `config` describes, without ever building it in memory."""
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shapes))
    weight_map = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(name, shapes[name], generator) for name in names}, path / file)
        weight_map.update(dict.fromkeys(names, file))
    index_file = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        if names and size + n_bytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += n_bytes
    yield names


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values of the scale of a trained model: matrices by their fan-in, norms and gates near their neutral."""
    if len(shape) >= 2:
        fan_in = math.prod(shape[1:])
        spread = 0.02 if "embed" in name or "lm_head" in name else 1.0 / math.sqrt(fan_in)
        return (torch.randn(shape, generator=generator) * spread).to(torch.bfloat16)
    offset = 1.0 if "linear_attn.norm" in name or ("visual" in name and name.endswith("norm.weight")) else 0.0
    return (torch.randn(shape, generator=generator) * 0.05 + offset).to(torch.bfloat16)


if __name__ == "__main__":
    main()
