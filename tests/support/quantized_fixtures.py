"""Makes tests/quant/formats/data: tiny Qwen3.5 checkpoints that gptqmodel and transformers with bitsandbytes wrote.

    python3.11 -m venv /tmp/rivals
    /tmp/rivals/bin/pip install torch==2.13.0 transformers==5.23.0 optimum==2.3.0 bitsandbytes==0.50.2 accelerate
    /tmp/rivals/bin/pip install --no-deps gptqmodel==7.7.0   # it asks for a newer torch than it needs
    /tmp/rivals/bin/pip install torchao device-smi pypcre tokenicer logbar requests datasets dill defuser
    /tmp/rivals/bin/python tests/support/quantized_fixtures.py

Beside each checkpoint lies `expected.npz`: weights as the tool that wrote it dequantizes them, in float32. So the
tests hold zreward's readers against the real files and need neither tool. Not part of the tests: it runs where both
tools are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BitsAndBytesConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # its default on a machine of 2 cores is 1, with which it fails

VOCABULARY = 32
KEPT_FILES = ("config.json", "model.safetensors", "quantize_config.json")

COMPARED = tuple(
    f"{name}.weight"
    for name in (
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_z",
        "linear_attn.out_proj",
        "mlp.down_proj",
    )
)

DYNAMIC = {
    r"+:.*\.mlp\.down_proj$": {"bits": 8, "group_size": -1},
    r"-:.*layers\.1\.mlp\.gate_proj$": {},
}
GPTQ: dict[str, dict[str, Any]] = {
    "gptq-v1": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "format": "gptq"},
    "gptq-v2-act-order": {
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "desc_act": True,
        "format": "gptq_v2",
        "dynamic": DYNAMIC,
    },
}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[1] / "quant" / "formats" / "data"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense, work = Path(folder) / "dense", Path(folder) / "work"
        tiny_model().save_pretrained(dense)
        write_tokenizer(dense)
        for name, options in GPTQ.items():
            keep(work, arguments.output / name, with_gptqmodel(dense, work, options))
        for name, options in BITSANDBYTES.items():
            keep(work, arguments.output / name, with_bitsandbytes(dense, work, options))


def tiny_model() -> Qwen3_5ForConditionalGeneration:
    """One DeltaNet and one full-attention layer; the 48 inputs of down_proj are no whole number of groups."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "full_attention_interval": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {**rope, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }
    vision = {
        "hidden_size": 8,
        "depth": 1,
        "intermediate_size": 16,
        "num_heads": 1,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
    }
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model.to(torch.bfloat16)


def write_tokenizer(path: Path) -> None:
    """gptqmodel wants a tokenizer to be there; nothing is tokenized with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>", pad_token="<2>").save_pretrained(path)


def with_gptqmodel(dense: Path, output: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Quantize with gptqmodel on random tokens; returns the weights as gptqmodel dequantizes them."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.models.definitions.qwen3_5 import Qwen3_5QModel

    Qwen3_5QModel.require_load_processor = False  # there is no image processor for 4 x 4 patches
    model = GPTQModel.load(
        str(dense), QuantizeConfig(**options, offload_to_disk=False), device="cpu", backend=BACKEND.GPTQ_TORCH
    )
    generator = torch.Generator().manual_seed(0)
    calibration = [
        {
            "input_ids": torch.randint(0, VOCABULARY, (1, 64), generator=generator),
            "attention_mask": torch.ones(1, 64, dtype=torch.long),
        }
        for _ in range(8)
    ]
    model.quantize(calibration, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(output))
    loaded = GPTQModel.load(str(output), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return dict(dequantized(loaded.model, "qweight", lambda m: m.float().dequantize_weight().T))


def with_bitsandbytes(dense: Path, output: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save with transformers; returns the weights as bitsandbytes dequantizes them."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    model = Qwen3_5ForConditionalGeneration.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(output)
    if "load_in_8bit" in options:
        return dict(
            dequantized(model, "state", lambda m: int8_vectorwise_dequant(m.weight.data, m.weight.SCB))
        )
    return dict(
        dequantized(model, "quant_state", lambda m: dequantized_4bit(m.weight.data, m.weight.quant_state))
    )


def dequantized_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """By the generic code of bitsandbytes.

    Version 0.50.2 has another path for CPUs, which is wrong where the inputs are no multiple of the block size: it
    starts a block in every row, while quantization, CUDA and the generic code run on through the flattened matrix.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_blockwise

    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    values: torch.Tensor = _dequantize_4bit_compute(
        packed.reshape(-1), scales.float(), state.code, state.blocksize, state.shape, torch.float32
    )
    return values


def dequantized(
    model: nn.Module, mark: str, weight: Callable[[Any], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if hasattr(module, mark):
            yield f"{name}.weight", weight(module).float()


def keep(work: Path, final: Path, expected: dict[str, torch.Tensor]) -> None:
    """Move what the tests read to `final`, with some of the weights alone, for their size."""
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir(parents=True)
    for name in KEPT_FILES:
        if (work / name).is_file():
            shutil.move(work / name, final / name)
    shutil.rmtree(work)
    chosen = {name: value for name, value in expected.items() if name.split("layers.0.")[-1] in COMPARED}
    arrays: dict[str, Any] = {name: np.ascontiguousarray(value.numpy()) for name, value in chosen.items()}
    np.savez_compressed(final / "expected.npz", **arrays)
    size = sum(file.stat().st_size for file in final.iterdir())
    print(json.dumps({"written": final.name, "bytes": size, "matrices": len(expected)}))


if __name__ == "__main__":
    main()
