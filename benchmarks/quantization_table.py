"""One table of drift: schemes of this project, and dense checkpoints that other tools quantized.

    python benchmarks/quantization_table.py CHECKPOINT --scheme int4 --scheme "int4 --budget 5.0bpw" \
        --rivals build/rivals --output build/quantization.json

Every row is scored by the same runtime on the same held-out scenes (seed 3000, 400 prompts with six images each)
and compared with the unquantized checkpoint. `benchmarks/quantization_rivals.py` writes the rivals: their weights
dequantized, nothing else touched, so that their codes are judged and not their runtimes; ours run as they ship,
with the rounded activations of their operators.

Rounding is chaotic: the same scheme calibrated on other images of the same kind comes out a fifth better or worse.
`--draws 3` calibrates ours on three sets of scenes (seeds 5000, 6000, 7000) and quotes means, for comparisons within
this project. `--keep` is a folder for the bundles; those that an earlier run left there are scored as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zreward.bundle import Bundle
from zreward.export import ExportOptions, export_bundle
from zreward.export.quantized import QuantizationOptions, probabilities
from zreward.quant.allocate import parse_budget
from zreward.quant.calibrate import CALIBRATION_SEED, HELD_OUT_SEED, Item, scene_items
from zreward.quant.report import drift_report
from zreward.synthetic import SceneConfig
from zreward.synthetic.dataset import SCENES_FILE, write_dataset

TOOLS = {
    "zreward": "#1d5fd1",
    "auto-round": "#be123c",
    "gptqmodel": "#15803d",
    "onnxruntime": "#7e22ce",
    "nncf": "#b45309",
}
"""Whose row it is, by the beginning of its name, and its colour in the plot."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scheme", action="append", default=[], help="as for --quant, then its options")
    parser.add_argument("--rivals", type=Path, help="folder of dense checkpoints with a rival.json each")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--draws", type=int, default=1, help="calibration sets for each of ours")
    parser.add_argument("--keep", type=Path, help="folder for our bundles, to go on from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="also draw size against drift, as SVG")
    options = parser.parse_args()
    items = scene_items(HELD_OUT_SEED, options.prompts, 6)
    with tempfile.TemporaryDirectory() as folder:
        base = exported(options.checkpoint, Path(folder) / "base")
        before = probabilities(base, items, "base", quiet)
        rows: list[dict[str, Any]] = []
        kept = options.keep or Path(folder)
        for text in options.scheme:
            draws = []
            for seed in range(CALIBRATION_SEED, CALIBRATION_SEED + 1000 * options.draws, 1000):
                bundle = quantized(options.checkpoint, kept, text, seed)
                bits = (bundle.manifest.quantization or {})["bits_per_weight"]
                draws.append(measured(f"zreward {text}", bits, base, bundle, before, items))
            rows.append(mean_of(draws))
            print(as_markdown(rows[-1:]), [f"{draw['mean_kl']:.5f}" for draw in draws], flush=True)
        for path in sorted(options.rivals.iterdir()) if options.rivals else ():
            if not (path / "rival.json").is_file():
                continue
            rival = json.loads((path / "rival.json").read_text())
            bundle = exported(path, Path(folder) / path.name)
            rows.append(measured(path.name, rival["bits_per_weight"], base, bundle, before, items))
            print(as_markdown(rows[-1:]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    if options.plot:
        options.plot.write_text(as_svg([row for row in rows if row["bits_per_weight"] < 6]))
    print("\n| quantization | bits | mean KL | mean abs Δμ | flips | HPA change, points |")
    print("|---|---|---|---|---|---|")
    print(as_markdown(sorted(rows, key=lambda row: row["mean_kl"])))


def exported(checkpoint: Path, output: Path) -> Bundle:
    return export_bundle(checkpoint, output, ExportOptions(parity=False))


def quantized(checkpoint: Path, folder: Path, text: str, seed: int) -> Bundle:
    """A bundle of `text`: a scheme, and --method and --budget as for `zreward export`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scheme")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--budget", type=parse_budget)
    chosen = parser.parse_args(shlex.split(text))
    output = folder / f"{text.replace(' ', '')}-{seed}"
    if output.exists():
        return Bundle.open(output)
    calibration = None
    if chosen.method != "rtn":
        data = folder / f"scenes-{seed}"
        if not data.exists():
            write_dataset(data, SceneConfig(), seed, 128, 2)
        calibration = str(data / SCENES_FILE)
    quantization = QuantizationOptions(
        chosen.scheme,
        method=chosen.method,
        calibration=calibration,
        budget=chosen.budget,
        allow_drift=True,
        judged=False,
    )
    return export_bundle(checkpoint, output, ExportOptions(parity=False, quantization=quantization))


def mean_of(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one scheme as one row: means, and the mean KL of each."""

    def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            key: mean([row[key] for row in rows])
            if isinstance(value, dict)
            else float(np.mean([row[key] for row in rows]))
            for key, value in rows[0].items()
            if key != "name"
        }

    return {"name": draws[0]["name"], **mean(draws), "draws": [draw["mean_kl"] for draw in draws]}


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


def as_svg(rows: list[dict[str, Any]]) -> str:
    """Bits per weight against mean KL (logarithmic), a colour for each tool; ours are named."""
    width, height, left, right, top, bottom = 760, 440, 70, 190, 40, 390
    bits = [row["bits_per_weight"] for row in rows]
    logs = [math.log10(row["mean_kl"]) for row in rows]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    first, last = min(bits) - 0.05, max(bits) + 0.05

    def across(value: float) -> float:
        return left + (value - first) / (last - first) * (width - left - right)

    def up(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="22" fill="#555">mean KL of the scores, nats: lower is better</text>',
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle" fill="#555">'
        "stored bits per quantized weight, scales included</text>",
    ]
    for power in range(-5, 0):
        for step in (1, 2, 5):
            value = step * 10.0**power
            if low <= math.log10(value) <= high:
                y = up(value)
                parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e2e2e2"/>')
                parts.append(
                    f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{value:g}</text>'
                )
    for tick in range(round(10 * first), round(10 * last) + 1):
        if tick % 2 == 0 and first <= tick / 10 <= last:
            parts.append(
                f'<text x="{across(tick / 10):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#555">'
                f"{tick / 10:g}</text>"
            )
    tool_of = {row["name"]: next(t for t in TOOLS if row["name"].startswith(t)) for row in rows}
    for order, tool in enumerate(dict.fromkeys(tool_of.values())):
        y = top + 20 * order
        parts.append(f'<circle cx="{width - right + 20}" cy="{y}" r="5" fill="{TOOLS[tool]}"/>')
        parts.append(f'<text x="{width - right + 32}" y="{y + 4}" fill="#333">{tool}</text>')
    for row in rows:
        tool = tool_of[row["name"]]
        x, y, colour = across(row["bits_per_weight"]), up(row["mean_kl"]), TOOLS[tool]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}" fill-opacity="0.85"/>')
        if tool == "zreward":
            text = row["name"].removeprefix("zreward ").replace("--budget ", "").replace("--method ", "")
            # Plain rounding lies among the dots of other tools: its name stands to the left.
            at = f'x="{x - 9:.1f}" y="{y + 4:.1f}" text-anchor="end"' if text.endswith("rtn") else ""
            at = at or f'x="{x - 4:.1f}" y="{y + 18:.1f}"'
            parts.append(f'<text {at} fill="{colour}">{text}</text>')
    return "".join(parts) + "</svg>\n"


def quiet(stage: str, done: int, total: int) -> None:
    pass


if __name__ == "__main__":
    main()
