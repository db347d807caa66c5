"""ONNX Runtime's CUDA provider end to end: the same scores as on the CPU, and what each stage takes.

    python -m benchmarks.gpu.onnxruntime_cuda --out build/gpu --json build/gpu/onnxruntime.json

Exports the reference student and a model of the 0.8B shape with random weights for the target cuda, which proves them
on the CPU, and scores with the provider `cuda`. Golden inputs are compared with the scores that the export gave them
on the CPU; of the student, drawn scenes too, with the CPU's scores of the same bundle where it runs there, else of a
float32 bundle. The largest difference of a score in points counts: limits are 1e-3 in float32, 2e-2 in float16 and 1e-1
in bfloat16, which keeps 8 bits. The exit status is 1 where one is exceeded, or a provider cannot be had.

It needs the packages of zreward[gpu,export] and no network. Times are medians in milliseconds for one picture of
512×512: a new prompt is the whole of vision, prompt, image and questions with the system text kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle
from zreward.errors import ZrewardError
from zreward.export import ExportOptions, export_bundle
from zreward.export.quantized import QuantizationOptions
from zreward.image import ImageInput
from zreward.quant.calibrate import scene_items
from zreward.runtime import Scorer
from zreward.runtime.bench.machine import describe_machine, versions
from zreward.runtime.bench.measure import measure
from zreward.runtime.bench.plan import BenchPlan

LIMITS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Points, by the type of the products."""

STUDENT = "reference student"
ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("vision", "prompt", "image_prefix", "questions", "new_prompt")

_SCENES_SEED = 77
_CANDIDATES = 4
_IMAGE_SIZE = 512

Items = Sequence[tuple[str, ImageInput]]


@dataclass(frozen=True)
class Case:
    """A model in one type, with or without quantized weights."""

    model: str
    weights: str
    quant: str | None = None

    @property
    def folder(self) -> str:
        return "-".join(filter(None, (self.model.replace(" ", "-"), self.weights, self.quant)))


CASES = (
    Case(STUDENT, "fp32"),
    Case(STUDENT, "fp16"),
    Case(STUDENT, "bf16"),
    Case(STUDENT, "fp16", "int4"),
    Case("0.8B", "fp16"),
    Case("0.8B", "bf16"),
    Case("0.8B", "fp16", "int4"),
)


@dataclass
class Outcome:
    """What was found of one case.

    Attributes:
        limit: of the differences.
        golden: largest difference of a score of the golden inputs, in points.
        scenes: the same of the drawn scenes; None where none were scored.
        compared_with: what the scenes were compared with.
        stages_ms: medians of the stages.
        samples_ms: what they are the medians of.
        error: why there is nothing else.
    """

    case: Case
    limit: float
    golden: float | None = None
    scenes: float | None = None
    compared_with: str | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None

    @property
    def passed(self) -> bool:
        differences = [d for d in (self.golden, self.scenes) if d is not None]
        return self.error is None and bool(differences) and max(differences) <= self.limit


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--provider", default="cuda", help="cpu tries the script where there is no GPU")
    parser.add_argument("--only", help="cases whose names contain this, such as student or fp16")
    parser.add_argument("--scenes", type=int, default=32, help="drawn scenes that the student scores")
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only is None or arguments.only in case.folder]
    outcomes = []
    for case in cases:
        outcome = _outcome(case, arguments)
        outcomes.append(outcome)
        print(f"{case.folder}: {outcome.error or 'done'}", file=sys.stderr, flush=True)
    print_table(outcomes)
    if arguments.json:
        facts = {"machine": asdict(describe_machine()), "versions": dict(versions())}
        found = [{**asdict(outcome), "passed": outcome.passed} for outcome in outcomes]
        report = {**facts, "provider": arguments.provider, "outcomes": found}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} cases within their limits")
    return 0 if outcomes and passed == len(outcomes) else 1


def _outcome(case: Case, arguments: argparse.Namespace) -> Outcome:
    outcome = Outcome(case, LIMITS[case.weights])
    try:
        bundle = exported(case, arguments.out)
        items = drawn_scenes(arguments.scenes) if case.model == STUDENT else []
        compare(outcome, bundle, arguments.provider, items, arguments.out)
        time_stages(outcome, bundle, arguments.provider, arguments.repetitions)
    except (ZrewardError, subprocess.CalledProcessError) as error:
        outcome.error = str(error)
    return outcome


def exported(case: Case, out: Path) -> Bundle:
    """The case as a bundle, which is made unless it is there."""
    path = out / "bundles" / case.folder
    if path.is_dir():
        return Bundle.open(path)
    options = ExportOptions(
        target="cuda",
        weights=case.weights,
        parity=False,
        quantization=_quantization(case.quant) if case.quant else None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return export_bundle(checkpoint(case.model, out), path, options)


def checkpoint(model: str, out: Path) -> Path:
    """The folder of a model, whose random weights are written unless they are there."""
    if model == STUDENT:
        return ROOT / "zreward" / "assets" / "reference-student"
    path = out / "checkpoints" / model
    if not (path / "contract.json").is_file():  # the last file that is written
        shutil.rmtree(path, ignore_errors=True)
        script = ROOT / "benchmarks" / "random_checkpoint.py"
        subprocess.run([sys.executable, str(script), "--shape", model, "--output", str(path)], check=True)
    return path


def drawn_scenes(number: int) -> Items:
    """Prompts and pictures that the student knows, always the same."""
    items = scene_items(_SCENES_SEED, -(-number // _CANDIDATES), _CANDIDATES)[:number]
    return [(item.prompt, item.image) for item in items]


def compare(outcome: Outcome, bundle: Bundle, provider: str, scenes: Items, out: Path) -> None:
    """Score with the provider, and set the largest differences to the CPU's scores."""
    golden = bundle.golden_items()
    bins = np.array(bundle.contract.bins)
    expected = np.array([[np.dot(item.probs[name], bins) for name in item.probs] for item in golden])
    items: Items = [(item.prompt, bundle.path / item.image) for item in golden]
    with Scorer.open(bundle.path, provider=provider) as scorer:
        outcome.golden = float(np.abs(means(scorer, items) - expected).max())
        found = means(scorer, scenes) if scenes else None
    if found is None:
        return
    here = bundle if outcome.case.weights != "bf16" else exported(Case(outcome.case.model, "fp32"), out)
    outcome.compared_with = f"the CPU, {here.manifest.weights}"
    with Scorer.open(here.path, provider="cpu") as scorer:
        outcome.scenes = float(np.abs(means(scorer, scenes) - found).max())


def means(scorer: Scorer, items: Items) -> NDArray[np.float64]:
    """Scores float64 [items, dimensions]."""
    scores = scorer.score_pairs(list(items))
    return np.array([[distribution.mean for distribution in score.dimensions.values()] for score in scores])


def time_stages(outcome: Outcome, bundle: Bundle, provider: str, repetitions: int) -> None:
    """Set the times of the stages for one picture."""
    plan = BenchPlan((_IMAGE_SIZE,), providers=(provider,), repetitions=repetitions, min_seconds=0)
    with Scorer.open(bundle.path, provider=provider) as scorer:
        (result,) = measure(scorer, plan)
    outcome.stages_ms = {name: result.stages[name].median_ms for name in STAGES}
    outcome.samples_ms = {name: list(result.stages[name].samples_ms) for name in STAGES}


def print_table(outcomes: Sequence[Outcome]) -> None:
    """One line a case, on stdout."""
    columns = ["case", "golden", "scenes", "limit", *(f"{stage}, ms" for stage in STAGES)]
    rows = [_line(outcome) for outcome in outcomes]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for outcome in outcomes:
        if not outcome.passed:
            print(f"FAILED {outcome.case.folder}: {outcome.error or 'beyond its limit'}")


def _line(outcome: Outcome) -> list[str]:
    def shown(values: Sequence[float | None], form: str) -> list[str]:
        return ["–" if value is None else format(value, form) for value in values]

    times = [outcome.stages_ms.get(stage) for stage in STAGES]
    differences = shown((outcome.golden, outcome.scenes, outcome.limit), ".1e")
    return [outcome.case.folder, *differences, *shown(times, ".2f")]


def _quantization(scheme: str) -> QuantizationOptions:
    return QuantizationOptions(scheme, method="rtn", allow_drift=True, judged=False)


if __name__ == "__main__":
    sys.exit(main())
