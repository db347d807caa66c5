"""What rounding the inputs of products with scales for blocks does to the scores.

Their bodies are MatMulNBits, whose accuracy level 4 rounds the inputs to 8 bits per block; level 0 multiplies floats.
Both are run by ONNX Runtime's own operators, without the kernels of this project, which only have level 4.

    python benchmarks/accuracy_level.py CHECKPOINT BUNDLE... --output build/accuracy-level.json

The bundles are quantized exports of CHECKPOINT (`benchmarks/quantization_table.py --keep` leaves some). Each is scored
on the same held-out scenes with either level in its graphs and compared with the unquantized checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir
from quantization_table import as_markdown, exported, measured, quiet

from zreward.bundle import Bundle, file_entries, write_manifest
from zreward.export.quantized import probabilities
from zreward.quant.calibrate import HELD_OUT_SEED, scene_items
from zreward.runtime.kernels import DISABLE

LEVELS = (4, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ[DISABLE] = "1"
    items = scene_items(HELD_OUT_SEED, options.prompts, 6)
    rows = []
    print("| quantization | bits | mean KL | mean abs Δμ | flips | HPA change, points |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = exported(options.checkpoint, Path(folder) / "base")
        before = probabilities(base, items, "base", quiet)
        for path in options.bundles:
            for level in LEVELS:
                bundle = with_level(path, level, Path(folder) / f"{path.name}-{level}")
                bits = (bundle.manifest.quantization or {})["bits_per_weight"]
                rows.append(measured(f"{path.name}, level {level}", bits, base, bundle, before, items))
                print(as_markdown(rows[-1:]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")


def with_level(source: Path, level: int, output: Path) -> Bundle:
    """A copy of the bundle whose functions have MatMulNBits of `level`; there must be some."""
    shutil.copytree(source, output)
    n_products = 0
    for path in output.glob("*.onnx"):
        model = ir.load(path)
        for node in (node for function in model.functions.values() for node in function):
            if node.op_type == "MatMulNBits":
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
                n_products += 1
        ir.save(model, path)
    assert n_products, f"{source}: no MatMulNBits in its functions"
    manifest = Bundle.open(source).manifest
    (output / "manifest.json").unlink()
    write_manifest(output, dataclasses.replace(manifest, files=file_entries(output)))
    return Bundle.open(output)


if __name__ == "__main__":
    main()
