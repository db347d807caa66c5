"""One table of drift: schemes of this project, and dense checkpoints that other tools quantized.

    python benchmarks/quantization_table.py CHECKPOINT --scheme int4 --scheme "int4 --budget 4.6bpw" \
        --rivals build/rivals --output build/quantization.json

Every row is scored by the same runtime on the same held-out scenes (seed 3000, 400 prompts with six images each)
and compared with the unquantized checkpoint. `benchmarks/quantization_rivals.py` writes the rivals: their weights
dequantized, nothing else touched, so that their codes are judged and not their runtimes; ours run as they ship,
with the rounded activations of their operators.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zreward.bundle import Bundle
from zreward.export import ExportOptions, export_bundle
from zreward.export.quantized import QuantizationOptions, probabilities
from zreward.quant.allocate import parse_budget
from zreward.quant.calibrate import HELD_OUT_SEED, Item, scene_items
from zreward.quant.report import drift_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scheme", action="append", default=[], help="as for --quant, then its options")
    parser.add_argument("--rivals", type=Path, help="folder of dense checkpoints with a rival.json each")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    items = scene_items(HELD_OUT_SEED, options.prompts, 6)
    with tempfile.TemporaryDirectory() as folder:
        base = exported(options.checkpoint, Path(folder) / "base")
        before = probabilities(base, items, "base", quiet)
        rows: list[dict[str, Any]] = []
        for index, text in enumerate(options.scheme):
            bundle = quantized(options.checkpoint, Path(folder) / f"ours-{index}", text)
            facts = bundle.manifest.quantization or {}
            rows.append(measured(f"zreward {text}", facts["bits_per_weight"], base, bundle, before, items))
            print(as_markdown(rows[-1:]), flush=True)
        for path in sorted(options.rivals.iterdir()) if options.rivals else ():
            if not (path / "rival.json").is_file():
                continue
            rival = json.loads((path / "rival.json").read_text())
            bundle = exported(path, Path(folder) / path.name)
            rows.append(measured(path.name, rival["bits_per_weight"], base, bundle, before, items))
            print(as_markdown(rows[-1:]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    print("\n| quantization | bits | mean KL | mean abs Δμ | flips | HPA change, points |")
    print("|---|---|---|---|---|---|")
    print(as_markdown(sorted(rows, key=lambda row: row["mean_kl"])))


def exported(checkpoint: Path, output: Path) -> Bundle:
    return export_bundle(checkpoint, output, ExportOptions(parity=False))


def quantized(checkpoint: Path, output: Path, text: str) -> Bundle:
    """A bundle of `text`: a scheme, and --method and --budget as for `zreward export`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scheme")
    parser.add_argument("--method")
    parser.add_argument("--budget", type=parse_budget)
    chosen = parser.parse_args(shlex.split(text))
    quantization = QuantizationOptions(
        chosen.scheme, method=chosen.method, budget=chosen.budget, allow_drift=True, judged=False
    )
    return export_bundle(checkpoint, output, ExportOptions(parity=False, quantization=quantization))


def measured(
    name: str, bits: float, base: Bundle, bundle: Bundle, before: np.ndarray, items: list[Item]
) -> dict[str, Any]:
    contract = base.contract
    names = contract.dimension_names
    report = drift_report(
        before,
        probabilities(bundle, items, name, quiet),
        [item.prompt for item in items],
        bins=contract.bins,
        dimensions=names,
        labels=np.array([[item.scores[d] for d in names] for item in items]),
        n_resamples=1,
    )
    rows = report.rows[:-1]
    return {
        "name": name,
        "bits_per_weight": bits,
        "mean_kl": float(np.mean([row.kl.mean for row in rows])),
        "mean_abs_difference": float(np.mean([row.abs_difference.mean for row in rows])),
        "pair_flips": float(np.mean([row.pair_flips.value for row in rows if row.pair_flips])),
        "hpa_change": float(np.mean([row.hpa.change for row in rows if row.hpa])),
        "by_dimension": {
            row.dimension: {
                "mean_kl": row.kl.mean,
                "mean_abs_difference": row.abs_difference.mean,
                "pair_flips": row.pair_flips.value if row.pair_flips else None,
                "hpa_change": row.hpa.change if row.hpa else None,
            }
            for row in rows
        },
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['mean_kl']:.5f} | "
        f"{row['mean_abs_difference']:.4f} | {row['pair_flips']:.2%} | {100 * row['hpa_change']:+.2f} |"
        for row in rows
    )


def quiet(stage: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
