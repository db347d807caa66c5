"""Exports with quantization: what is decided and refused first, what judges the result, and what is written."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.conftest import Cli
from tests.support.bundles import lowered_here
from tests.support.kills import is_left, run_and_kill
from tests.support.models import Shape, write_checkpoint
from zreward.bundle import Bundle
from zreward.checkpoint import Checkpoint
from zreward.contract import DriftLimits, ScoreContract
from zreward.errors import CheckpointError, QuantizationError, UsageError, ZrewardError
from zreward.export import ExportOptions, export_bundle
from zreward.export.quantized import DRIFT_FILE, DRIFT_PAGE, QuantizationOptions, plan_quantization
from zreward.quant.calibrate import scene_items
from zreward.quant.drift import DriftReport
from zreward.runtime import Scorer
from zreward.runtime.verify import verify_bundle

UNJUDGED = QuantizationOptions("int4", method="rtn", allow_drift=True, judged=False)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with three labelled images each."""
    folder = tmp_path_factory.mktemp("held-out")
    lines = []
    for index, item in enumerate(scene_items(21, n_prompts=3, candidates=3)):
        Image.fromarray(np.asarray(item.image)).save(folder / f"{index}.png")
        lines.append({"prompt": item.prompt, "image": f"{index}.png", "scores": dict(item.scores)})
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def export(checkpoint: Path, output: Path, quantization: QuantizationOptions, **options: Any) -> Bundle:
    return export_bundle(checkpoint, output, ExportOptions(quantization=quantization, **options))


def options_for(held_out: Path, scheme: str = "int4", **more: Any) -> QuantizationOptions:
    more.setdefault("method", "rtn")
    more.setdefault("allow_drift", True)
    return QuantizationOptions(scheme, evaluation=str(held_out), **more)


@pytest.fixture(scope="module")
def judged(tiny_checkpoint: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """4 bits by GPTQ, the vision tower in 8, mixed within a budget, calibrated and judged on the same few images."""
    quantization = options_for(
        held_out,
        "int4-g16,model.visual.*=int8-weight-g16",
        method="gptq",
        calibration=str(held_out),
        budget=7.0,
    )
    return export(tiny_checkpoint, tmp_path_factory.mktemp("judged") / "bundle", quantization)


def test_a_quantized_bundle_proves_itself_and_has_its_report(judged: Bundle) -> None:
    assert verify_bundle(judged.path).n_golden > 0
    facts = judged.manifest.quantization
    assert facts is not None
    assert facts["method"] == "gptq"
    assert facts["bits_per_weight"] <= 7.0
    formats = {layer["format"] for layer in facts["layers"].values()}
    assert {"int4-g16", "int8-weight-g16"} <= formats
    assert any(layer["sensitivity"] > 0 for layer in facts["layers"].values())
    assert {DRIFT_FILE, DRIFT_PAGE} <= set(judged.manifest.files)
    drift = DriftReport.load(judged.path / DRIFT_FILE)
    assert (drift.n_items, drift.n_prompts) == (9, 3)
    assert drift.size is not None
    assert drift.size.weight_bytes_after < drift.size.weight_bytes_before
    assert 0 < drift.overall.kl.mean < 1
    assert not [p for p in judged.path.iterdir() if p.is_dir() and p.name != "golden"]


def test_the_report_compares_what_the_bundles_score(
    judged: Bundle, tiny_bundle: Path, held_out: Path
) -> None:
    lines = [json.loads(line) for line in held_out.read_text().splitlines()]
    pairs = [(line["prompt"], held_out.parent / line["image"]) for line in lines]
    with Scorer.open(tiny_bundle) as before, Scorer.open(judged.path) as after:
        means = [
            np.array([[score[name].mean for name in before.contract.dimension_names] for score in scores])
            for scores in (before.score_pairs(pairs), after.score_pairs(pairs))
        ]
    drift = DriftReport.load(judged.path / DRIFT_FILE)
    found = [row.abs_difference.mean for row in drift.rows[:-1]]
    np.testing.assert_allclose(found, np.abs(means[1] - means[0]).mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4-asym", "int8-weight-g16"])
@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_every_target_runs_every_scheme(
    scheme: str, target: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = export(
        tiny_checkpoint, tmp_path / "bundle", dataclasses.replace(UNJUDGED, scheme=scheme), target=target
    )
    verify_bundle(bundle.path)
    image = Image.new("RGB", (64, 64), "teal")
    with Scorer.open(tiny_bundle) as float_scorer, Scorer.open(bundle.path) as scorer:
        expected, found = (s.score(prompt="a teal square", images=[image])[0] for s in (float_scorer, scorer))
    for name in bundle.contract.dimension_names:
        assert not np.array_equal(found[name].probs, expected[name].probs)
        assert np.abs(found[name].probs - expected[name].probs).max() < 0.5  # random weights exaggerate it


@pytest.mark.parametrize(("scheme", "stored"), [("int8", "int8-static"), ("fp8", "fp8")])
def test_tensorrt_rounds_inputs_with_scales_that_calibration_found(
    held_out: Path, tmp_path: Path, scheme: str, stored: str
) -> None:
    shape = Shape(layers=2, full_attention_interval=2, vision_depth=1)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    few = held_out.with_name("few.jsonl")
    few.write_text("".join(held_out.read_text().splitlines(keepends=True)[:1]))
    options = QuantizationOptions(
        f"{scheme},*.down_proj=int4", calibration=str(few), allow_drift=True, judged=False
    )
    with lowered_here():
        bundle = export(checkpoint, tmp_path / "bundle", options, target="tensorrt", weights="fp16")
    verify_bundle(bundle.path)
    facts = bundle.manifest.quantization
    assert facts is not None
    assert facts["scheme"] == f"{stored},*.down_proj=int4" and facts["method"] == "gptq"
    formats = {layer["format"]: layer for layer in facts["layers"].values()}
    assert set(formats) == {stored, "int4-g128"}
    assert 0 < formats[stored]["input_scale"] < 1 and "input_scale" not in formats["int4-g128"]
    assert bundle.manifest.work is not None and bundle.manifest.work.decoder.integer_per_row > 0


def test_drift_over_a_limit_writes_nothing(copy: Path, held_out: Path, tmp_path: Path) -> None:
    contract = ScoreContract.load(copy)
    dataclasses.replace(contract, drift=DriftLimits(mean_kl=1e-12)).save(copy)
    strict = options_for(held_out, allow_drift=False)
    with pytest.raises(QuantizationError, match=r"no bundle was written.*mean KL.*--allow-drift"):
        export(copy, tmp_path / "out" / "bundle", strict)
    assert not list((tmp_path / "out").iterdir())
    export(copy, tmp_path / "out" / "bundle", dataclasses.replace(strict, allow_drift=True))


def test_a_budget_without_data_to_measure_on_is_refused(tiny_checkpoint: Path, held_out: Path) -> None:
    one = held_out.with_name("one.jsonl")
    one.write_text(held_out.read_text().splitlines()[0] + "\n")
    options = QuantizationOptions("int4", calibration=str(one), budget=5.0, allow_drift=True)
    with pytest.raises(QuantizationError, match="at least two calibration items"):
        plan_quantization(Checkpoint.open(tiny_checkpoint), options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scheme": "int3"}, QuantizationError, "unknown format 'int3'"),
        ({"scheme": "int4-g48"}, QuantizationError, "not a power of two"),
        ({"scheme": "int4-g128"}, QuantizationError, "group size 128 does not divide"),
        ({"scheme": "int4,nothing=int8"}, QuantizationError, "'nothing' names no layer"),
        ({"scheme": "int4,lm_head=int8"}, QuantizationError, "names no layer"),
        ({"scheme": "none"}, QuantizationError, "quantizes nothing"),
        ({"calibration": "nowhere.jsonl", "method": None}, QuantizationError, "nowhere.jsonl: no such file"),
        ({"evaluation": "nowhere.jsonl"}, QuantizationError, "nowhere.jsonl: no such file"),
        ({"budget": 5.0}, QuantizationError, "a budget is spent by measurement"),
        ({"calibration": "scenes"}, UsageError, "uses no calibration data"),
        ({"scheme": "int8-static"}, QuantizationError, "int8-static is for --target tensorrt"),
        ({"scheme": "fp8"}, QuantizationError, "fp8 is for --target tensorrt; use int8"),
    ],
)
def test_mistakes_are_known_before_any_work(
    changes: dict[str, Any], error: type[ZrewardError], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(QuantizationOptions("int4", method="rtn", allow_drift=True), **changes)
    with pytest.raises(error, match=message):
        plan_quantization(Checkpoint.open(tiny_checkpoint), options)
    with pytest.raises(error, match=message):
        export(tiny_checkpoint, tmp_path / "bundle", options)
    assert not list(tmp_path.iterdir())


def test_what_a_gpu_cannot_round_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for scheme in ("int8", "int4,*.down_proj=int8", "int8-static", "fp8"):
        options = QuantizationOptions(scheme, method="rtn", allow_drift=True)
        with pytest.raises(QuantizationError, match=r"no product that rounds its inputs.*int8-weight"):
            export(tiny_checkpoint, tmp_path / "bundle", options, target="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scheme": "int8"}, QuantizationError, "rounds inputs with scales that calibration finds"),
        ({"scheme": "fp8"}, QuantizationError, "rounds inputs with scales that calibration finds"),
        ({"scheme": "int4-asym"}, QuantizationError, "TensorRT cannot multiply int4-g64-asym"),
        ({"scheme": "int8-weight-g16"}, QuantizationError, "TensorRT cannot multiply int8-weight-g16"),
        (
            {"budget": 5.0, "method": None, "calibration": "scenes"},
            UsageError,
            "--budget mixes groups of 8 bits",
        ),
    ],
)
def test_what_tensorrt_cannot_multiply_is_refused(
    changes: dict[str, Any], error: type[ZrewardError], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(QuantizationOptions("int4", method="rtn", allow_drift=True), **changes)
    with pytest.raises(error, match=message):
        export(tiny_checkpoint, tmp_path / "bundle", options, target="tensorrt")
    assert not list(tmp_path.iterdir())


def test_weights_of_nan_are_found_before_quantization(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.layers.3.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight.*NaN"):
        export(copy, tmp_path / "out" / "bundle", UNJUDGED)
    assert not list((tmp_path / "out").iterdir())


def test_the_command_line_quantizes_and_says_what_it_did(
    cli: Cli, tiny_checkpoint: Path, held_out: Path, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    arguments = [
        "--quant",
        "int8-weight-g16",
        "--method",
        "rtn",
        "--evaluation",
        str(held_out),
        "--allow-drift",
    ]
    result = cli("export", tiny_checkpoint, "-o", output, *arguments)
    assert result.returncode == 0, result.stderr
    assert "best-of-4" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.strip().startswith(("realism", "overall"))]
    assert len(rows) == 2
    assert all(len(row) <= 80 for row in rows)
    inspected = cli("inspect", output)
    assert "int8-weight-g16 by rtn" in inspected.stdout
    assert "decay of the recurrent state" in inspected.stdout
    assert "inputs rounded" not in inspected.stdout
    again = cli("quantize", tiny_checkpoint, "-o", tmp_path / "gptq", "--bits", "4", "--method", "rtn")
    assert again.returncode == 0, again.stderr
    assert cli("export", tmp_path / "gptq", "-o", tmp_path / "second", "--quant", "int4").returncode == 2
    assert cli("export", tmp_path / "gptq", "-o", tmp_path / "second").returncode == 0
    verify_bundle(tmp_path / "second")
    came_quantized = cli("inspect", tmp_path / "second")
    assert came_quantized.returncode == 0, came_quantized.stderr
    assert "int4-g64" in came_quantized.stdout


def test_inspect_shows_what_rounding_costs_the_inputs(
    cli: Cli, tiny_checkpoint: Path, held_out: Path, tmp_path: Path
) -> None:
    """One line for the layers of an input, in whichever block; figures are the largest of these blocks."""
    scheme = "none,*.layers.1.mlp.down_proj=int8-weight,*.mlp.*_proj=int8,*.self_attn.*=int8"
    options = QuantizationOptions(
        scheme, method="gptq", calibration=str(held_out), allow_drift=True, judged=False
    )
    bundle = export(tiny_checkpoint, tmp_path / "bundle", options)
    layers = json.loads(cli("inspect", bundle.path, "--json").stdout)["quantization"]["layers"]
    shown = cli("inspect", bundle.path).stdout
    line = re.compile(r"^ (\S.*?) +([\d.]+) +([\d.]+)% +([\d.]+)% +([\d.]+)% +([\d.–]+) *$", re.MULTILINE)
    rows = {name: figures for name, *figures in line.findall(shown)}
    assert list(rows) == [
        "layers.*.mlp.gate_proj, up_proj",
        "layers.*.mlp.down_proj",
        "layers.*.self_attn.q_proj, k_proj,",
        "layers.*.self_attn.o_proj",
    ]
    assert all(len(match.group()) <= 80 for match in line.finditer(shown))
    down = [
        layer["inputs"] for name, layer in layers.items() if name.endswith("down_proj") and "inputs" in layer
    ]
    assert len(down) == 3
    ratio, *errors, strength = rows["layers.*.mlp.down_proj"]
    assert float(ratio) == pytest.approx(max(inputs["row_ratio"] for inputs in down), abs=0.051)
    for error, key in zip(errors, ("tensor_error", "row_error", "smoothed_error"), strict=True):
        assert float(error) == pytest.approx(100 * max(inputs[key] for inputs in down) ** 0.5, abs=0.051)
    strengths = [inputs["smoothing"] for inputs in down]
    assert {float(end) for end in strength.split("–")} == {min(strengths), max(strengths)}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--quant", "int5"], 1, "unknown format"),
        (["--quant", "int4", "--budget", "many"], 1, "is not a number of bits"),
        (["--method", "rtn"], 2, "belong to --quant"),
        (["--quant", "int4", "--parity"], 2, "is judged by its drift"),
    ],
)
def test_the_command_line_refuses(
    arguments: list[str], status: int, message: str, cli: Cli, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = cli("export", tiny_checkpoint, "-o", tmp_path / "bundle", *arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_at_any_moment_a_quantized_export_leaves_a_good_bundle_or_none(
    tiny_checkpoint: Path, held_out: Path, tmp_path: Path
) -> None:
    output = tmp_path / "folder" / "bundle"
    command = ["export", tiny_checkpoint, "-o", output, "--quant", "int4", "--method", "rtn", "--no-parity"]
    command += ["--evaluation", held_out, "--allow-drift", "--force"]
    seconds = run_and_kill(command, output)
    verify_bundle(output)
    shutil.rmtree(output)
    generator = random.Random(7)
    leftovers = 0
    for moment in sorted(generator.uniform(0, 1.05) for _ in range(10)):
        run_and_kill(command, output, moment * seconds)
        leftovers += is_left(output)
        if output.exists():
            verify_bundle(output)
    assert leftovers >= 5, "it was killed too late to prove anything"
    run_and_kill(command, output)
    verify_bundle(output)
    assert not is_left(output)
