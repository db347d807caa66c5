"""GPTQ checkpoints in both directions: zreward's in transformers with gptqmodel, and gptqmodel's own in zreward.

    make demo    # or any other target: makes .venv, whose zreward quantizes and exports
    /tmp/rivals/bin/python benchmarks/gptq_interop.py [CHECKPOINT] --json build/gptq-interop.json

/tmp/rivals is the environment of benchmarks/quantization_rivals.py, whose first lines make it; it has gptqmodel but
not what an export needs, so `zreward quantize` and `zreward export` run as commands (`--zreward`, by default the one
in .venv). CHECKPOINT is the reference student unless another is given.

Each tool writes a checkpoint of 4 bits from it. transformers loads that with gptqmodel's modules, all of which must
be there, and answers every question about held-out scenes in full passes of its own (`zreward.reference`). The same
directory goes through `zreward export`, whose codes must come from the checkpoint, and the runtime scores the same
scenes. Printed is |Δμ| between the two, largest and mean over images and dimensions, and beside it how far the
quantization itself moved μ: a reader that got the codes wrong would be off by more than that.

The two targets differ in one thing. `onnx` multiplies in float32, as transformers does there, so it shows whether
the codes were read right; exit status 1 where one of its float32 rows exceeds BOUND. `cpu`, the default of an export,
has ONNX Runtime round the inputs of products with 4 bits to 8 bits per block, and that rounding is the whole
difference (with accuracy level 0 in its graphs it gives what `onnx` gives). float16 and bfloat16 are for information
as well: transformers then rounds every activation of the network. On CPUs with AVX512-BF16 gptqmodel's modules
dequantize their codes and multiply in float32 and float16, and have a product on codes in bfloat16. All of it takes 15
minutes on two cores, `--dtypes float32` four.

Where the tools needed help:

- gptqmodel loads no Qwen3.5 without a Qwen image processor: `require_load_processor` is set to False. It calibrates
  on text alone, so it gets the token ids of the scenes without their pixels; here only what it writes matters.
- Its folder has no `contract.json`, which is copied from CHECKPOINT; the tokenizer is the one that it wrote.
- transformers cannot load gptqmodel's Qwen3.5: config.json does not say that DeltaNet's in_proj_a and in_proj_b stayed
  floats, and optimum makes quantized modules of them too. The names of the matrices that are quantized in the file are
  handed to it as `modules_in_block_to_quantize`, which `zreward quantize` writes itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from zreward.bundle import Bundle
from zreward.checkpoint import Checkpoint
from zreward.contract import CONTRACT_FILE
from zreward.image import preprocess
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.quant.calibrate import CALIBRATION_SEED, HELD_OUT_SEED, Item, scene_items
from zreward.reference import ReferenceModel
from zreward.runtime import Scorer

ROOT = Path(__file__).resolve().parents[1]

Floats = NDArray[np.float64]

BOUND = 1e-2
"""Of |Δμ| in float32, on a scale from 1 to 5."""

WRITERS = ("zreward", "gptqmodel")
TARGETS = ("cpu", "onnx")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One checkpoint in one type of transformers, against one bundle.

    Attributes:
        writer: the tool that quantized and wrote the checkpoint.
        dtype: in which transformers computes.
        modules: how many of which class of gptqmodel transformers runs.
        target: of the bundle.
        largest: |Δμ| of the worst image and dimension.
        mean: over images and dimensions.
        is_judged: whether BOUND applies.
    """

    writer: str
    dtype: str
    modules: str
    target: str
    largest: float
    mean: float
    is_judged: bool


@dataclass(frozen=True)
class Means:
    """μ of every item as everyone computes it, float64 [items, dimensions]; `runtime` by target."""

    writer: str
    transformers: dict[str, Floats]
    modules: dict[str, str]
    runtime: dict[str, Floats]

    def rows(self) -> list[Row]:
        return [
            Row(
                self.writer,
                dtype,
                self.modules[dtype],
                target,
                *distance(expected, scored),
                is_judged=(dtype, target) == ("float32", "onnx"),
            )
            for dtype, expected in self.transformers.items()
            for target, scored in self.runtime.items()
        ]


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    items = scene_items(HELD_OUT_SEED, options.prompts, 4)
    with (
        contextlib.redirect_stdout(sys.stderr),  # gptqmodel prints much there
        tempfile.TemporaryDirectory() as folder,
        ReferenceModel(options.checkpoint) as reference,
    ):
        before = reference_means(reference, items)
        results = [measured(writer, Path(folder), reference, items, options) for writer in options.writers]
    rows = [row for result in results for row in result.rows()]
    seconds = time.perf_counter() - start
    print_table(rows, results, before, seconds)
    if options.json:
        save(options.json, rows, results, before, seconds)
    sys.exit(any(row.is_judged and not row.largest <= BOUND for row in rows))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "zreward/assets/reference-student")
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts, four images each")
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=WRITERS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--zreward", default=ROOT / ".venv/bin/zreward", help="the command that exports")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measured(
    writer: str, folder: Path, reference: ReferenceModel, items: Sequence[Item], options: argparse.Namespace
) -> Means:
    """Quantize with `writer` and score what it wrote, in transformers and in the runtime."""
    path = folder / writer
    if writer == "zreward":
        choice = ["--method", "gptq", "--bits", "4", "--calibration", "scenes"]
        run(options.zreward, "quantize", options.checkpoint, "-o", path, *choice)
    else:
        quantize_with_gptqmodel(options.checkpoint, path)
    names = quantized_modules(path)
    runtime = {}
    for target in options.targets:
        bundle = folder / f"{writer}-{target}"
        run(options.zreward, "export", path, "-o", bundle, "--target", target)
        check_codes_are_kept(bundle, names)
        runtime[target] = runtime_means(bundle, items, options.threads)
    expected, modules = {}, {}
    for dtype in options.dtypes:
        # The same prompts, pixels and softmax as for the float checkpoint, another model.
        reference.model = load_in_transformers(path, dtype, names)
        modules[dtype] = gptqmodel_modules(reference.model, names)
        expected[dtype] = reference_means(reference, items)
    return Means(writer, expected, modules, runtime)


def run(*command: str | Path) -> None:
    """Run a command, whose results are messages here."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr.fileno())


def quantize_with_gptqmodel(checkpoint: Path, output: Path) -> None:
    """A checkpoint by gptqmodel's own loader, quantizer and writer, with its defaults in groups of 64."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.models.definitions.qwen3_5 import Qwen3_5QModel

    Qwen3_5QModel.require_load_processor = False
    config = QuantizeConfig(bits=4, group_size=64, offload_to_disk=False)
    model = GPTQModel.load(str(checkpoint), config, device="cpu", backend=BACKEND.GPTQ_TORCH)
    model.quantize(text_samples(checkpoint), batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(str(output))
    shutil.copyfile(checkpoint / CONTRACT_FILE, output / CONTRACT_FILE)


def text_samples(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    """Token ids of 16 calibration scenes: item i is asked question i modulo their number, its pixels are left out."""
    contract = Checkpoint.open(checkpoint).contract()
    encoder = PromptEncoder(contract, load_tokenizer(checkpoint))
    samples = []
    for index, item in enumerate(scene_items(CALIBRATION_SEED, 16, 1)):
        n_tokens = preprocess(item.image, contract.image).n_tokens
        dimension = index % len(contract.dimensions)
        ids = torch.from_numpy(encoder.sequence_ids(item.prompt, n_tokens, dimension))[None]
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return samples


def quantized_modules(path: Path) -> list[str]:
    """Names of the modules whose codes are in the weights file."""
    tensors = Checkpoint.open(path).tensors
    names = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    assert names, f"{path} holds no codes"
    return names


def load_in_transformers(path: Path, dtype: str, names: Sequence[str]) -> Qwen3_5ForConditionalGeneration:
    """The checkpoint as transformers loads it, told which modules are quantized where its config is silent."""
    config = Qwen3_5Config.from_pretrained(path)
    if config.quantization_config.get("modules_in_block_to_quantize") is None:
        config.quantization_config["modules_in_block_to_quantize"] = [list(names)]
    loaded: Any = Qwen3_5ForConditionalGeneration.from_pretrained(
        path, config=config, dtype=getattr(torch, dtype), output_loading_info=True
    )
    model: Qwen3_5ForConditionalGeneration = loaded[0].eval()
    assert not loaded[1]["missing_keys"], f"not in {path}: {loaded[1]['missing_keys']}"
    return model


def gptqmodel_modules(model: Qwen3_5ForConditionalGeneration, names: Sequence[str]) -> str:
    """Number and class of the modules that are gptqmodel's, which must be those quantized in the file."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    found = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, BaseQuantLinear)}
    assert sorted(found) == list(names), f"quantized in one of the two: {sorted(set(found) ^ set(names))}"
    classes = sorted(set(found.values()))
    return ", ".join(f"{list(found.values()).count(name)} × {name}" for name in classes)


def check_codes_are_kept(bundle: Path, names: Sequence[str]) -> None:
    """The bundle's quantized matrices must be those of the checkpoint, not floats or quantized anew."""
    facts = Bundle.open(bundle).manifest.quantization
    assert facts is not None and facts["method"] == "gptq", f"{bundle} was not exported from codes"
    assert sorted(facts["layers"]) == list(names), f"{bundle} has other quantized matrices than the file"


def reference_means(reference: ReferenceModel, items: Sequence[Item]) -> Floats:
    """μ by transformers, float64 [items, dimensions]."""
    bins = np.array(reference.contract.bins)
    return np.stack([reference.probabilities(item.prompt, item.image) @ bins for item in items])


def runtime_means(bundle: Path, items: Sequence[Item], threads: int) -> Floats:
    """μ by the runtime, float64 [items, dimensions]."""
    with Scorer.open(bundle, threads=threads) as scorer:
        names = scorer.contract.dimension_names
        scores = scorer.score_pairs([(item.prompt, item.image) for item in items])
        return np.array([[score[name].mean for name in names] for score in scores])


def distance(a: Floats, b: Floats) -> tuple[float, float]:
    """Largest and mean |Δμ|."""
    return float(np.abs(a - b).max()), float(np.abs(a - b).mean())


def print_table(rows: Sequence[Row], results: Sequence[Means], before: Floats, seconds: float) -> None:
    n_items, n_dimensions = before.shape
    print(f"{n_items} images, {n_dimensions} dimensions, {seconds:.0f} s; |Δμ| of transformers and runtime\n")
    print("| written by | modules in transformers | in | target | largest | mean | bound |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        verdict = ("kept" if row.largest <= BOUND else "EXCEEDED") if row.is_judged else ""
        facts = [row.writer, row.modules, row.dtype, row.target, f"{row.largest:.1e}", f"{row.mean:.1e}"]
        print(f"| {' | '.join([*facts, verdict])} |")
    print()
    for result in results:
        for dtype, after in result.transformers.items():
            largest, mean = distance(before, after)
            print(
                f"{result.writer}'s quantization moved μ by {largest:.1e} at most, {mean:.1e} in the mean ({dtype})"
            )


def save(path: Path, rows: Sequence[Row], results: Sequence[Means], before: Floats, seconds: float) -> None:
    """The rows, and every μ that they come from."""
    tools = ("torch", "transformers", "optimum", "gptqmodel", "onnxruntime")
    content = {
        "versions": {tool: version(tool) for tool in tools},
        "seconds": seconds,
        "bound": BOUND,
        "rows": [asdict(row) for row in rows],
        "means": {
            "float checkpoint": before.tolist(),
            **{
                result.writer: {
                    "transformers": {dtype: means.tolist() for dtype, means in result.transformers.items()},
                    "runtime": {target: means.tolist() for target, means in result.runtime.items()},
                }
                for result in results
            },
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
