"""The same checkpoint, quantized to 4 bits by what people use otherwise; each result is a dense checkpoint again.

    python3.11 -m venv /tmp/rivals
    /tmp/rivals/bin/pip install torch==2.13.0 transformers==5.23.0 onnx onnx-ir onnxruntime==1.31.1 \\
        nncf==3.4.0 openvino auto-round==0.16.1 optimum==2.3.0 rich typer tokenizers pillow
    /tmp/rivals/bin/pip install --no-deps gptqmodel==7.7.0   # it asks for a newer torch than it needs
    /tmp/rivals/bin/pip install torchao device-smi pypcre tokenicer logbar requests datasets dill defuser accelerate
    /tmp/rivals/bin/python benchmarks/quantization_rivals.py CHECKPOINT --output build/rivals [--only nncf-sym-g64 …]

The environment is a separate one because the tools' own requirements disagree with each other. zreward is imported
from this checkout.

Each rival writes a folder: the checkpoint with its matrices replaced by what the tool's codes stand for, in float32,
and everything else untouched, so that one scorer judges all of them; and `rival.json` with the tool, its settings,
which matrices it quantized and the bits a weight that it stores (codes, scales and zero points in the tool's own
types, and whatever else it adds). All calibrate on the same data: the synthetic scenes that zreward calibrates on, or
`--calibration FILE`.

What each tool is given, and where it needed help:

- onnxruntime: `MatMulNBitsQuantizer`, which onnxruntime-genai and mobius call, on a graph with one MatMul a matrix.
  Round-to-nearest looks at nothing but the matrix, so this is what it does in the whole model.
- NNCF: `compress_weights` on the torch model, as optimum-intel calls it, with its data-aware recipe for 4 bits (AWQ
  and scale estimation) and without data. Groups that do not divide the inputs are adjusted, its own option. The
  factors that AWQ puts in front of a product are folded into the matrix; a forward pass checks that nothing is lost.
- gptqmodel: its own GPTQ class with its own defaults, layer by layer in the order of its model definition, each stage
  on inputs that come from the stages before it, quantized. Its model loader is not used, because it calibrates on
  text alone (it drops the pixels) and leaves the vision tower as it is.
- auto-round: `AutoRound` on the model with the vision blocks, default iterations. It leaves
  the merger in floats, so its drift is that of the other matrices alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # its default on a machine of 2 cores is 1, with which it fails
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import Qwen3_5ForConditionalGeneration

from zreward.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Checkpoint
from zreward.image import preprocess
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.quant.calibrate import SCENES, calibration_items
from zreward.quant.scheme import rule_for
from zreward.safetensors_file import SafetensorsWriter, TensorSpec

Sample = dict[str, torch.Tensor]
Matrices = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Task:
    """What a rival works on: the checkpoint, the matrices that it may quantize and the calibration samples."""

    checkpoint: Checkpoint
    names: Sequence[str]
    samples: Sequence[Sample]

    @property
    def n_questions(self) -> int:
        """Consecutive samples that show one image."""
        return len(self.checkpoint.contract().dimensions)

    def model(self) -> Qwen3_5ForConditionalGeneration:
        model = Qwen3_5ForConditionalGeneration.from_pretrained(self.checkpoint.path, dtype=torch.float32)
        model.config.use_cache = False
        model.config.text_config.use_cache = False
        return model.eval()

    def shape(self, name: str) -> tuple[int, int]:
        out, inputs = self.checkpoint.info(name).shape
        return out, inputs


@dataclass(frozen=True)
class Result:
    """Dequantized matrices, and the bits that each of them takes as the tool stores it."""

    tool: str
    matrices: Matrices
    bits: Mapping[str, float]


Rival = Callable[[Task], Result]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", default=SCENES, help="JSONL of prompts and images; default: scenes")
    parser.add_argument("--samples", type=int, default=256, help="calibration images to use at most")
    parser.add_argument("--decoder-only", action="store_true", help="leave the vision tower and the merger")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS))
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    names = [
        name
        for name in checkpoint.tensors
        if rule_for(name).quantizable and not (arguments.decoder_only and ".visual." in name)
    ]
    samples = calibration_samples(checkpoint, arguments.calibration, arguments.samples)
    for rival in arguments.only:
        settings, run = RIVALS[rival]
        start = time.perf_counter()
        result = run(Task(checkpoint, names, samples))
        seconds = time.perf_counter() - start
        save(
            checkpoint,
            result,
            arguments.output / rival,
            {"rival": rival, "settings": settings, "seconds": seconds},
        )


def calibration_samples(checkpoint: Checkpoint, source: str, limit: int) -> list[Sample]:
    """Inputs of the model's forward pass: every image is asked all questions in turn, as in calibration."""
    contract = checkpoint.contract()
    encoder = PromptEncoder(contract, load_tokenizer(checkpoint.path))
    samples = []
    for item in calibration_items(source)[:limit]:
        patches = preprocess(item.image, contract.image)
        for dimension in range(len(contract.dimensions)):
            ids = torch.from_numpy(encoder.sequence_ids(item.prompt, patches.n_tokens, dimension))[None]
            samples.append(
                {
                    "input_ids": ids,
                    "attention_mask": torch.ones_like(ids),
                    "mm_token_type_ids": (ids == encoder.image_token_id).int(),
                    "pixel_values": torch.from_numpy(patches.pixel_values),
                    "image_grid_thw": torch.tensor([patches.grid_thw]),
                }
            )
    return samples


def save(checkpoint: Checkpoint, result: Result, path: Path, about: dict[str, Any]) -> None:
    """Write the dense checkpoint and `rival.json`."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for file in checkpoint.path.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, path / file.name)
    specs = {name: TensorSpec(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    specs |= {name: TensorSpec("F32", value.shape) for name, value in result.matrices.items()}
    with SafetensorsWriter(path / WEIGHTS_FILE, specs) as writer:
        for name in specs:
            writer.write(
                name, result.matrices[name] if name in result.matrices else checkpoint.read_stored(name)
            )
    sizes = {name: value.size for name, value in result.matrices.items()}
    total = sum(result.bits[name] * size for name, size in sizes.items())
    about |= {
        "tool": result.tool,
        "bits_per_weight": total / sum(sizes.values()),
        "quantized_weights": sum(sizes.values()),
        "matrices": sorted(result.matrices),
    }
    (path / "rival.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    assert (path / CONFIG_FILE).is_file()
    print(json.dumps({key: value for key, value in about.items() if key != "matrices"}), flush=True)


# onnxruntime


def onnxruntime_rtn(task: Task, block: int, symmetric: bool) -> Result:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    matrices, bits = {}, {}
    for name in task.names:
        weight = task.checkpoint.read(name)
        out, inputs = weight.shape
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, out])],
            [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        quantizer = MatMulNBitsQuantizer(model, block_size=block, is_symmetric=symmetric)
        quantizer.process()
        done: onnx.ModelProto = quantizer.model.model
        stored = {t.name: numpy_helper.to_array(t) for t in done.graph.initializer}
        codes, scales, zeros = (
            next((v for n, v in stored.items() if n.endswith(suffix)), None)
            for suffix in ("_Q4", "_scales", "_zero_points")
        )
        assert codes is not None and scales is not None
        matrices[name] = dequantized_nbits(codes, scales.reshape(out, -1), zeros, inputs)
        n_bits = 32 * scales.size + (0 if zeros is None else 8 * zeros.size)
        bits[name] = 4 + n_bits / weight.size
    return Result(f"onnxruntime {version('onnxruntime')}", matrices, bits)


def dequantized_nbits(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None, inputs: int
) -> NDArray[np.float32]:
    """The matrix of a com.microsoft::MatMulNBits, float32 [out, in]: codes [out, blocks, block / 2], low half first."""
    out, blocks, half = codes.shape
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(out, blocks, 2 * half).astype(np.float32)
    offset = np.full((out, blocks), 8, dtype=np.float32)
    if zeros is not None:
        packed = zeros.reshape(out, -1)
        offset = np.stack([packed & 15, packed >> 4], axis=-1).reshape(out, -1)[:, :blocks].astype(np.float32)
    weight: NDArray[np.float32] = ((values - offset[..., None]) * scales[..., None]).reshape(out, -1)[
        :, :inputs
    ]
    return np.ascontiguousarray(weight)


# NNCF


def nncf_int4(task: Task, mode: str, group: int, with_data: bool) -> Result:
    import nncf

    model = task.model()
    weighted = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv3d)
    kept = [
        n for n, m in model.named_modules() if isinstance(m, weighted) and f"{n}.weight" not in task.names
    ]
    patterns = sorted({_kind_pattern(name, task.names) for name in kept})
    recipe: dict[str, Any] = {}
    if with_data:
        dataset = nncf.Dataset(task.samples, lambda sample: sample)
        recipe = {"dataset": dataset, "awq": True, "scale_estimation": True, "subset_size": len(task.samples)}
    else:
        recipe = {"dataset": nncf.Dataset(task.samples[:1], lambda sample: sample)}
    compressed = nncf.compress_weights(
        model,
        mode=getattr(nncf.CompressWeightsMode, f"INT4_{mode}"),
        group_size=group,
        ratio=1.0,
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
        **recipe,
    )
    matrices, bits = nncf_matrices(compressed, task)
    check_same_outputs(task, compressed, matrices)
    return Result(f"nncf {version('nncf')}", matrices, bits)


def _kind_pattern(name: str, quantized: Sequence[str]) -> str:
    """The end of a module's name, as long as it takes: NNCF's nodes leave out the indices and much of the path."""
    parts = name.split(".")
    is_shared = any(other.removesuffix(".weight").rpartition(".")[2] == parts[-1] for other in quantized)
    return f"(.*[/.])?{'[/.]'.join(parts[-2:] if is_shared else parts[-1:])}[/.].*"


def nncf_matrices(model: nn.Module, task: Task) -> tuple[Matrices, dict[str, float]]:
    """Decompressed weights, with the factors that AWQ left in front of a product folded in."""
    matrices: Matrices = {}
    bits: dict[str, float] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for path, module in model.named_modules():
        if "WeightsDecompressor" not in type(module).__name__:
            continue
        name = path.split("post_hooks.")[1].rpartition("__")[0].replace(":", ".")
        with torch.no_grad():
            weight = module(parameters[name]).float().numpy()
        matrices[name] = np.ascontiguousarray(weight.reshape(task.shape(name)))
        stored = dict(module.named_buffers())
        n_bits = sum(8 * v.element_size() * v.numel() for v in stored.values())
        bits[name] = 4 + n_bits / weight.size
    assert set(matrices) == set(task.names), sorted(set(matrices) ^ set(task.names))[:5]
    for name, factor in awq_factors(model, task.samples[0]):
        matrices[name] = matrices[name] * factor
        bits[name] += 32 * factor.size / matrices[name].size
    return matrices, bits


def awq_factors(model: nn.Module, sample: Sample) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each factor on inputs and the matrix behind it: the one that is running, or runs next, when it is applied."""
    running: list[str] = []
    pending: list[NDArray[np.float32]] = []
    found: list[tuple[str, NDArray[np.float32]]] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            found.extend((name, factor) for factor in pending)
            pending.clear()
            running.append(name)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    def multiply(module: nn.Module, *_: Any) -> None:
        factor = module.get_parameter("_scale_value").detach().float().numpy().reshape(1, -1)
        if running:
            found.append((running[-1], factor))
        else:
            pending.append(factor)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles += [
                module.register_forward_pre_hook(enter(f"{name}.weight")),
                module.register_forward_hook(leave),
            ]
        elif type(module).__name__ == "SQMultiply":
            handles.append(module.register_forward_pre_hook(multiply))
    with torch.no_grad():
        model(**sample)
    for handle in handles:
        handle.remove()
    assert not pending
    yield from found


def check_same_outputs(task: Task, compressed: nn.Module, matrices: Matrices) -> None:
    """The dense model with `matrices` must compute what the tool's own model computes."""
    dense = task.model()
    with torch.no_grad():
        expected = compressed(**task.samples[0]).logits[0, -1]
        load_matrices(dense, matrices)
        got = dense(**task.samples[0]).logits[0, -1]
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert difference < 1e-3, f"the dense model differs from the tool's by {difference:.2e}"


def load_matrices(model: nn.Module, matrices: Matrices) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in matrices.items():
            parameters[name].copy_(torch.from_numpy(value))


# gptqmodel

STAGES = (
    ("attn.qkv", "linear_attn.in_proj_qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("linear_attn.in_proj_z",),
    ("attn.proj", "linear_attn.out_proj", "self_attn.o_proj"),
    ("mlp.linear_fc1", "merger.linear_fc1", "mlp.gate_proj", "mlp.up_proj"),
    ("mlp.linear_fc2", "merger.linear_fc2", "mlp.down_proj"),
)


class _Enough(Exception):  # noqa: N818 - not an error: the rest of the pass is not needed
    pass


def gptqmodel_gptq(task: Task, group: int) -> Result:
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization import GPTQ

    model, matrices, bits = task.model(), {}, {}
    modules = dict(model.named_modules())
    for stage in gptq_stages(task.names):
        tasks = {}
        for name in stage:
            config = QuantizeConfig(bits=4, group_size=group, offload_to_disk=False)
            tasks[name] = GPTQ(modules[name.removesuffix(".weight")], config)
            tasks[name].quantizer.configure(perchannel=True)
        in_vision = all(".visual." in name for name in stage)
        feed(model, modules, tasks, task.samples[:: task.n_questions if in_vision else 1])
        for name, layer in tasks.items():
            weight, scale, _zero, g_idx, *_ = layer.quantize(blocksize=128)
            out, inputs = task.shape(name)
            matrices[name] = as_packed(weight, scale, g_idx)
            # float16 scales, zero points of 4 bits although symmetric, and g_idx: what its checkpoints hold
            bits[name] = 4 + 20 * math.ceil(inputs / group) / inputs + 32 / out
            load_matrices(model, {name: matrices[name]})
            print(f"gptqmodel: {name}", file=sys.stderr, flush=True)
    return Result(f"gptqmodel {version('gptqmodel')}", matrices, bits)


def as_packed(weight: torch.Tensor, scale: torch.Tensor, g_idx: torch.Tensor) -> NDArray[np.float32]:
    """The weight with its scales rounded to float16, as gptqmodel packs them."""
    of_input = scale.detach().float().reshape(weight.shape[0], -1)[:, g_idx.long()]
    steps = torch.round(weight.detach().float() / of_input)
    packed: NDArray[np.float32] = (steps * of_input.half().float()).numpy()
    return np.ascontiguousarray(packed)


def gptq_stages(names: Sequence[str]) -> Iterator[list[str]]:
    """Matrices that are quantized on one pass over the data, block after block in the order of the forward pass."""
    blocks: dict[str, list[str]] = {}
    for name in sorted(names, key=_forward_order):
        blocks.setdefault(_block(name), []).append(name)
    for members in blocks.values():
        for endings in STAGES:
            stage = [n for n in members if n.removesuffix(".weight").endswith(endings)]
            if stage:
                yield stage


def _block(name: str) -> str:
    parts = name.split(".")
    index = next(
        (i for i, part in enumerate(parts) if part.isdigit()),
        parts.index("merger") if "merger" in parts else 0,
    )
    return ".".join(parts[: index + 1])


def _forward_order(name: str) -> tuple[int, int]:
    index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return (0 if "visual.blocks" in name else 1 if "visual" in name else 2), index


def feed(
    model: nn.Module, modules: Mapping[str, nn.Module], tasks: Mapping[str, Any], samples: Sequence[Sample]
) -> None:
    """Show every sample's inputs to the tasks; a pass ends when all of them have seen theirs."""
    seen: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            tasks[name].add_batch(inputs[0].detach(), output.detach())
            seen.add(name)
            if len(seen) == len(tasks):
                raise _Enough

        return add

    handles = [modules[n.removesuffix(".weight")].register_forward_hook(hook(n)) for n in tasks]
    for sample in samples:
        seen.clear()
        try:
            with torch.no_grad():
                model(**sample)
        except _Enough:
            pass
    for handle in handles:
        handle.remove()


# auto-round


def auto_round_int4(task: Task, group: int) -> Result:
    from auto_round import AutoRound
    from transformers import PreTrainedTokenizerFast

    model = task.model()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(task.checkpoint.path / "tokenizer.json"))
    rounder = AutoRound(
        model,
        tokenizer,
        processor=tokenizer,  # it must be something; samples that are model inputs do not pass through it
        bits=4,
        group_size=group,
        sym=True,
        nsamples=len(task.samples),
        seqlen=min(sample["input_ids"].shape[1] for sample in task.samples),
        batch_size=1,
        gradient_accumulate_steps=8,  # samples differ in length, so a batch of 8 comes one by one
        dataset=list(task.samples),
        device_map="cpu",
        enable_torch_compile=False,
        quant_nontext_module=any(".visual." in name for name in task.names),
    )
    done, _ = rounder.quantize()
    matrices, bits = {}, {}
    for path, module in done.named_modules():
        name = f"{path}.weight"
        if name in task.names and getattr(module, "bits", 16) == 4 and hasattr(module, "scale"):
            inputs = task.shape(name)[1]
            matrices[name] = np.ascontiguousarray(module.weight.detach().float().numpy())
            bits[name] = 4 + 20 * math.ceil(inputs / group) / inputs
    assert matrices, "auto-round quantized nothing"
    return Result(f"auto-round {version('auto-round')}", matrices, bits)


def _rtn(block: int, symmetric: bool) -> tuple[str, Rival]:
    kind = "symmetric" if symmetric else "asymmetric"
    return f"round-to-nearest, block {block}, {kind}", lambda task: onnxruntime_rtn(task, block, symmetric)


def _nncf(mode: str, group: int, with_data: bool) -> tuple[str, Rival]:
    recipe = "AWQ and scale estimation" if with_data else "no data"
    return f"INT4_{mode}, group {group}, {recipe}", lambda task: nncf_int4(task, mode, group, with_data)


def _gptq(group: int) -> tuple[str, Rival]:
    return f"GPTQ, 4 bits, group {group}, its defaults", lambda task: gptqmodel_gptq(task, group)


def _auto_round(group: int) -> tuple[str, Rival]:
    return f"4 bits, group {group}, 200 iterations", lambda task: auto_round_int4(task, group)


RIVALS: dict[str, tuple[str, Rival]] = {
    "onnxruntime-b32": _rtn(32, True),
    "onnxruntime-b32-asym": _rtn(32, False),
    "onnxruntime-b128": _rtn(128, True),
    "nncf-sym-g64": _nncf("SYM", 64, True),
    "nncf-sym-g128": _nncf("SYM", 128, True),
    "nncf-asym-g64": _nncf("ASYM", 64, True),
    "nncf-asym-g128": _nncf("ASYM", 128, True),
    "nncf-asym-g128-no-data": _nncf("ASYM", 128, False),
    "gptqmodel-g64": _gptq(64),
    "gptqmodel-g128": _gptq(128),
    "auto-round-g64": _auto_round(64),
    "auto-round-g128": _auto_round(128),
}


if __name__ == "__main__":
    main()
