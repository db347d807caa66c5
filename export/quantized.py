"""What an export with quantization decides before any long work, and how the result is judged.

The judgement scores the same held-out items twice in the runtime that users will run: with the unquantized model,
as a bundle of its own that is thrown away, and with the bundle that is about to be written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle
from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError, UsageError
from zreward.export.bfloat16 import open_rounded
from zreward.export.job import Lowered, QuantizationJob
from zreward.export.passes.qdq_products import TENSORRT_GROUPS, can_multiply
from zreward.progress import Progress
from zreward.quant.calibrate import (
    SCENES,
    SCENES_MAX_PARAMETERS,
    Item,
    calibration_items,
    default_data,
    held_out_items,
)
from zreward.quant.drift import DriftReport, LayerFacts, SizeFacts
from zreward.quant.report import check_drift, drift_report
from zreward.quant.report_page import write_report_page
from zreward.quant.scheme import DEFAULT_GROUPS, Scheme, Table, format_name, resolve, with_static_inputs
from zreward.quant.source import QuantizedCheckpoint
from zreward.runtime.backends import open_session
from zreward.runtime.engine import Engine
from zreward.runtime.score import Score
from zreward.runtime.scorer import Scorer

DRIFT_FILE, DRIFT_PAGE = "drift.json", "drift.html"

_CHUNK = 24


@dataclass(frozen=True)
class QuantizationOptions:
    """How to quantize, and what to judge it on.

    Attributes:
        scheme: see `zreward.quant.scheme`.
        method: "rtn" or "gptq"; None takes gptq where there is calibration data.
        calibration: JSONL with a prompt and an image a line, or "scenes"; None takes scenes for models up to
            300 million parameters, and round-to-nearest without data beyond.
        evaluation: held-out JSONL (labels under `scores` are used), or "scenes"; None as for calibration.
        budget: stored bits per quantized weight that formats may be mixed up to.
        allow_drift: write the bundle although its drift exceeds the contract's limits, or nothing judged it.
        judged: False, with `allow_drift`, leaves the judgement out where it would be possible.
        device: where calibration runs, for example "cpu" or "cuda".
    """

    scheme: str
    method: str | None = None
    calibration: str | None = None
    evaluation: str | None = None
    budget: float | None = None
    allow_drift: bool = False
    judged: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class QuantizationPlan:
    """The options with everything decided, and the held-out items; without items nothing is judged.

    `scheme` and `groups` are what the scheme of the options means on the target.
    """

    options: QuantizationOptions
    scheme: str
    groups: Mapping[str, int]
    method: str
    calibration: str | None
    held_out: Sequence[Item]

    def job(self, store: Path) -> QuantizationJob:
        chosen = self.options
        return QuantizationJob(
            self.scheme,
            self.method,
            chosen.budget,
            self.calibration,
            chosen.device,
            str(store),
            self.groups,
        )


def plan_quantization(
    source: Checkpoint, options: QuantizationOptions, target: str = "cpu"
) -> QuantizationPlan:
    """Decide and check everything that can be known without work.

    Args:
        source: the checkpoint.
        options: what was asked for.
        target: the runtime to lower for, which decides what can be multiplied.

    Raises:
        QuantizationError: the scheme does not fit the checkpoint, a data file is not usable, or nothing would
            judge the result.
        UsageError: the checkpoint is quantized already, or the options contradict each other.
    """
    if isinstance(source, QuantizedCheckpoint):
        raise UsageError(f"{source.path} is quantized already; export it without --quant to keep its weights")
    scheme, groups, table = _on_target(source, options, target)
    default = default_data(source)
    calibration = options.calibration or (None if options.method == "rtn" else default)
    if options.method == "rtn" and options.calibration:
        raise UsageError(
            "round-to-nearest uses no calibration data; leave --calibration out, or --method rtn"
        )
    method = options.method or ("gptq" if calibration else "rtn")
    if method != "rtn" and calibration is None:
        raise QuantizationError(f"{method} needs calibration data; give --calibration FILE, or --method rtn")
    if method == "rtn" and any(chosen.has_static_inputs for chosen in table.formats.values()):
        raise QuantizationError(
            f"{target} rounds inputs with scales that calibration finds; give --calibration FILE and no --method "
            "rtn, or keep the inputs as they are with int8-weight"
        )
    if options.budget is not None and calibration is None:
        raise QuantizationError("a budget is spent by measurement; give --calibration FILE")
    if calibration and calibration != SCENES:
        n_items = len(calibration_items(calibration))  # a file with a mistake is refused now
        if options.budget is not None and n_items < 2:
            raise QuantizationError(f"{calibration}: a budget needs at least two calibration items")
    evaluation = options.evaluation or (default if options.judged else None)
    if evaluation is None and not options.allow_drift:
        raise QuantizationError(
            "a quantized bundle must be judged on held-out data; give --evaluation FILE, or --allow-drift to "
            "write it unjudged"
        )
    held_out = held_out_items(evaluation) if evaluation else ()
    return QuantizationPlan(options, scheme, groups, method, calibration, held_out)


def _on_target(
    source: Checkpoint, options: QuantizationOptions, target: str
) -> tuple[str, Mapping[str, int], Table]:
    """What the scheme means on `target`, the groups of formats that name none, and the format of every tensor.

    Raises:
        QuantizationError: the scheme does not fit the checkpoint, or the target cannot multiply one of its formats.
        UsageError: a budget for a target that multiplies few formats.
    """
    is_tensorrt = target == "tensorrt"
    scheme = with_static_inputs(options.scheme) if is_tensorrt else options.scheme
    groups = TENSORRT_GROUPS if is_tensorrt else DEFAULT_GROUPS
    table = resolve(Scheme.parse(scheme, groups), {n: info.shape for n, info in source.tensors.items()})
    for name, chosen in table.formats.items():
        layer, written = name.removesuffix(".weight"), format_name(chosen)
        if is_tensorrt and not can_multiply(chosen):
            raise QuantizationError(
                f"{layer}: TensorRT cannot multiply {written}; it takes int4 in groups, int8-weight with a scale "
                "per output (-g0), and no zero points"
            )
        if target == "cuda" and chosen.rounds_inputs:
            raise QuantizationError(
                f"{layer}: ONNX Runtime's CUDA provider has no product that rounds its inputs to 8 bits, as {written} "
                "wants; keep the inputs with int8-weight, or export with --target tensorrt"
            )
        if chosen.has_static_inputs and not is_tensorrt:
            other = (
                "use int8" if chosen.is_float8 else "this target finds the scales of inputs itself, with int8"
            )
            raise QuantizationError(f"{layer}: {written} is for --target tensorrt; {other}")
    if is_tensorrt and options.budget is not None:
        raise UsageError(
            "--budget mixes groups of 8 bits, which TensorRT cannot multiply; name exceptions in --quant instead"
        )
    return scheme, groups, table


def probabilities(bundle: Bundle, items: Sequence[Item], stage: str, report: Progress) -> NDArray[np.float64]:
    """Bin probabilities of every item, float64 [items, dimensions, bins].

    Raises:
        ZrewardError: an item cannot be scored. A judgement on part of the data would look like one on all.
    """
    names, rows = bundle.contract.dimension_names, []
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    small = bundle.manifest.model.parameters <= SCENES_MAX_PARAMETERS
    workers = min(len(chunks), os.cpu_count() or 1) if small else 1
    threads = max(1, (os.cpu_count() or 1) // workers)
    opened = partial(open_session, provider="cpu", threads=threads)
    engine = Engine(bundle, open_graph=lambda path: open_rounded(path, opened))
    with Scorer(engine) as scorer, ThreadPoolExecutor(workers) as pool:

        def score(chunk: Sequence[Item]) -> list[Score]:
            return scorer.score_pairs([(item.prompt, item.image) for item in chunk])

        for scores in pool.map(score, chunks):
            rows += [[score[name].probs for name in names] for score in scores]
            report(stage, len(rows), len(items))
    return np.array(rows, dtype=np.float64)


def judge(
    bundle: Bundle,
    plan: QuantizationPlan,
    before: NDArray[np.float64],
    bytes_before: int,
    lowered: Lowered,
    report: Progress,
) -> DriftReport:
    """Score the held-out items with the quantized bundle and compare with the probabilities `before`.

    Raises:
        QuantizationError: a limit of the contract is exceeded, and the options do not allow it.
    """
    items = plan.held_out
    after = probabilities(bundle, items, "scoring the quantized model", report)
    contract, facts = bundle.contract, lowered.quantization
    assert facts is not None
    drift = drift_report(
        before,
        after,
        [item.prompt for item in items],
        bins=contract.bins,
        dimensions=contract.dimension_names,
        labels=_labels(items, contract.dimension_names),
        size=SizeFacts(bytes_before, lowered.weight_bytes, facts["bits_per_weight"]),
        layers=[
            LayerFacts(name, layer["format"], layer["bits"], layer.get("sensitivity"), layer.get("error"))
            for name, layer in facts["layers"].items()
        ],
        title=f"{facts['scheme']}, {facts['method']}",
    )
    exceeded = check_drift(drift, contract.drift)
    if exceeded and not plan.options.allow_drift:
        raise QuantizationError(
            "quantization moves the scores too far, and no bundle was written: "
            + "; ".join(exceeded)
            + ". Use more bits or smaller groups, calibrate on more of your own data, or accept it with "
            "--allow-drift"
        )
    return drift


def write_drift(bundle: Bundle, drift: DriftReport) -> None:
    """Write the report as `drift.json` and as a page, `drift.html`, into the bundle's directory."""
    drift.save(bundle.path / DRIFT_FILE)
    write_report_page(bundle.path / DRIFT_PAGE, drift, bundle.contract.drift)


def _labels(items: Sequence[Item], names: Sequence[str]) -> NDArray[np.float64] | None:
    """Labels float64 [items, dimensions]; None unless every item is labelled in every dimension."""
    rows = [[item.scores.get(name, math.nan) for name in names] for item in items]
    labels = np.array(rows, dtype=np.float64)
    return None if np.isnan(labels).any() else labels
