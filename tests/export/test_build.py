"""Checkpoint to bundle: what is refused and when, what the manifest says, and kills at any moment."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import zreward.export.build as build_module
from tests.support.bundles import lowered_here
from tests.support.kills import is_left, run_and_kill
from tests.support.models import write_checkpoint
from zreward.bundle import Bundle, check_files
from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import (
    BackendError,
    CheckpointError,
    ContractError,
    ExportError,
    UsageError,
    ZrewardError,
)
from zreward.export import ExportOptions, export_bundle
from zreward.export.build import _reachable_positions
from zreward.export.passes.score_head import fuse_score_head
from zreward.image import ImageSpec, resized_size
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.runtime import Scorer
from zreward.runtime.verify import verify_bundle
from zreward.training.reference_model import train_tokenizer

UNPROVED = ExportOptions(parity=False)


@pytest.fixture
def in_process() -> Iterator[None]:
    """Lower in this process, which is quicker here and lets a test change a pass."""
    with lowered_here():
        yield


@pytest.fixture
def no_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if an export comes as far as its long work."""

    def fail(*_: object) -> None:
        raise AssertionError("the lowering began")

    monkeypatch.setattr(build_module, "lower_in_child", fail)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (40, 90), (100, 50)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def probs_of(bundle: Path, prompt: str = "a red fox") -> np.ndarray:
    with Scorer.open(bundle) as scorer:
        scores = scorer.score(prompt=prompt, images=pictures())
    return np.array([[score[name].probs for name in score] for score in scores])


# --- a good export


def test_the_manifest_says_what_was_proved(bundle_path: Path, checkpoint_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    check_files(bundle)
    manifest = bundle.manifest
    assert (manifest.target, manifest.weights, manifest.label_mass) == ("cpu", "fp32", False)
    assert manifest.parity is not None and manifest.parity.n_images == 4
    assert 0 < manifest.parity.max_difference <= 1e-4
    assert manifest.parity.max_mean_difference <= 4 * 9 * manifest.parity.max_difference
    assert manifest.model.parameters == Checkpoint.open(checkpoint_path).n_parameters
    assert set(manifest.versions) == {"zreward", "mobius-onnx", "onnx-ir", "onnxruntime"}
    assert bundle.contract == Checkpoint.open(checkpoint_path).contract()
    assert (bundle_path / "tokenizer.json").read_bytes() == (checkpoint_path / "tokenizer.json").read_bytes()


def test_nothing_but_listed_files_is_in_a_bundle(bundle_path: Path) -> None:
    files = {p.relative_to(bundle_path).as_posix() for p in bundle_path.rglob("*") if p.is_file()}
    assert files == set(Bundle.open(bundle_path).manifest.files) | {"manifest.json"}
    assert [p.name for p in bundle_path.parent.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("in_process")
def test_a_bfloat16_checkpoint_keeps_its_embedding(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype="bfloat16")
    reports: list[tuple[str, int, int]] = []
    export_bundle(checkpoint, tmp_path / "fp32", UNPROVED, lambda *report: reports.append(report))
    export_bundle(checkpoint, tmp_path / "bf16", ExportOptions(weights="bf16", label_mass=True, parity=False))
    for name in ("fp32", "bf16"):
        manifest = Bundle.open(tmp_path / name).manifest
        assert manifest.embedding.dtype == "bfloat16" and manifest.weights == name
        assert _size(tmp_path / name / "embedding.bin") == 640 * 64 * 2
    ratio = _size(tmp_path / "bf16" / "vision.onnx.data") / _size(tmp_path / "fp32" / "vision.onnx.data")
    assert ratio < 0.7  # vectors, rotary tables and padding stay as they are
    # weights that are bfloat16 in the checkpoint lose nothing when they are stored as bfloat16
    np.testing.assert_allclose(probs_of(tmp_path / "bf16"), probs_of(tmp_path / "fp32"), atol=1e-5)

    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["building the graphs", "writing weights", "scoring golden inputs"]
    written = [(done, total) for stage, done, total in reports if stage == "writing weights"]
    assert written == sorted(written) and written[-1][0] == written[-1][1] > 0


@pytest.mark.usefixtures("in_process")
def test_half_precision_and_label_mass(bundle_path: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    options = ExportOptions(weights="fp16", label_mass=True, parity=False)
    export_bundle(checkpoint_path, tmp_path / "bundle", options)
    difference = np.abs(probs_of(tmp_path / "bundle") - probs_of(bundle_path)).max()
    assert 0 < difference < 0.02
    with Scorer.open(tmp_path / "bundle") as scorer:
        masses = scorer.score(prompt="a red fox", images=pictures())[0].label_mass
    assert masses is not None and all(0 < mass < 1 for mass in masses.values())
    assert not Bundle.open(bundle_path).manifest.label_mass
    ratio = _size(tmp_path / "bundle" / "decoder.onnx.data") / _size(bundle_path / "decoder.onnx.data")
    assert ratio < 0.75  # the vocabulary rows of the label mass included


def _size(path: Path) -> int:
    return path.stat().st_size


# --- input that is refused before any work


def _damage(checkpoint: Path, damage: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    weights = checkpoint / "model.safetensors"
    if damage == "no contract":
        (checkpoint / "contract.json").unlink()
    elif damage == "contract of other patches":
        ScoreContract.default(ImageSpec(patch_size=14)).save(checkpoint)
    elif damage == "no tokenizer":
        (checkpoint / "tokenizer.json").unlink()
    elif damage == "tokenizer without markers":
        text = (checkpoint / "tokenizer.json").read_text()
        (checkpoint / "tokenizer.json").write_text(text.replace("<|image_pad|>", "<|picture|>"))
    elif damage == "tokenizer of another model":
        train_tokenizer(["another text"], vocabulary=300).save(str(checkpoint / "tokenizer.json"))
    elif damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    else:
        config["model_type"] = damage
        (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("no_lowering")
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no contract", ContractError, "zreward contract"),
        ("contract of other patches", CheckpointError, "image.patch_size is 14, .* has 8"),
        ("no tokenizer", CheckpointError, "no tokenizer at"),
        ("tokenizer without markers", ContractError, "image_token.* must be exactly one"),
        ("tokenizer of another model", CheckpointError, "not the tokenizer that the model was trained with"),
        ("truncated weights", CheckpointError, "truncated, copy it again"),
        ("no weights", CheckpointError, "safetensors only"),
        ("qwen3_5_moe", CheckpointError, "'qwen3_5_moe' is not supported"),
        ("llama", CheckpointError, "'llama' is not supported"),
    ],
)
def test_a_damaged_checkpoint(
    checkpoint_copy: Path, tmp_path: Path, damage: str, error: type[ZrewardError], message: str
) -> None:
    _damage(checkpoint_copy, damage)
    with pytest.raises(error, match=message):
        export_bundle(checkpoint_copy, tmp_path / "out" / "bundle", UNPROVED)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_lowering")
def test_an_output_that_cannot_be_written(checkpoint_path: Path, bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists; choose another name"):
        export_bundle(checkpoint_path, bundle_path, UNPROVED)
    (tmp_path / "notes.txt").write_text("text")
    for name in ("notes.txt", "."):
        with pytest.raises(UsageError, match="not a bundle; it is not replaced"):
            export_bundle(checkpoint_path, tmp_path / name, dataclasses.replace(UNPROVED, force=True))
    with pytest.raises(UsageError, match="cannot be written here"):
        export_bundle(checkpoint_path, tmp_path / "notes.txt" / "bundle", UNPROVED)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("no_lowering")
def test_a_missing_backend_is_noticed_first(
    checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"zreward\[cpu\]"):
        export_bundle(checkpoint_path, tmp_path / "bundle", UNPROVED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int7"}, "'int7'; choose from fp32, fp16, bf16"),
        ({"target": "npu"}, "'npu'; this version has cpu"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options)


# --- failures on the way


def test_a_missing_tensor_fails_in_the_child_with_its_own_error(
    checkpoint_copy: Path, tmp_path: Path
) -> None:
    file = checkpoint_copy / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.language_model.layers.2.linear_attn.A_log")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lack the tensor '.*layers\.2\.linear_attn\.A_log'"):
        export_bundle(checkpoint_copy, tmp_path / "bundle", UNPROVED)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.linear_attn.dt_bias",
        "model.visual.blocks.1.attn.qkv.weight",
    ],
)
def test_a_weight_of_nan_leaves_nothing_behind(checkpoint_copy: Path, tmp_path: Path, name: str) -> None:
    file = checkpoint_copy / "model.safetensors"
    tensors = load_file(file)
    tensors[name].reshape(-1)[-1] = np.nan
    save_file(tensors, file)
    with pytest.raises(ExportError, match=f"'{name}' holds NaN"):
        export_bundle(checkpoint_copy, tmp_path / "bundle", UNPROVED)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.usefixtures("in_process")
def test_a_wrong_graph_is_refused_by_parity(
    checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse_reversed(
        model: ir.Model, code_ids: Sequence[int], bins: Sequence[float], *, label_mass: bool
    ) -> int:
        return fuse_score_head(model, code_ids[::-1], bins, label_mass=label_mass)

    monkeypatch.setattr("zreward.export.targets.shared.fuse_score_head", fuse_reversed)
    with pytest.raises(ExportError, match=r"differs from transformers by .* no bundle was written"):
        export_bundle(checkpoint_path, tmp_path / "bundle", ExportOptions(parity=True))
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_dies_is_an_error(
    checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zreward.child.sys.executable", "/bin/false")
    with pytest.raises(ExportError, match="builds the graphs ended with status 1"):
        export_bundle(checkpoint_path, tmp_path / "bundle", UNPROVED)
    assert list(tmp_path.iterdir()) == []


# --- reachable positions


@pytest.mark.parametrize("max_tokens", [1, 4, 40, 64, 1024])
@pytest.mark.parametrize("min_share", [0.0, 0.5, 1.0])
def test_every_image_of_the_budget_has_positions(
    checkpoint_path: Path, max_tokens: int, min_share: float
) -> None:
    side = 16
    spec = ImageSpec(
        patch_size=8,
        min_pixels=max(1, int(min_share * max_tokens * side**2)),
        max_pixels=max_tokens * side**2,
    )
    contract = dataclasses.replace(ScoreContract.default(spec), max_prompt_tokens=1)
    encoder = PromptEncoder(contract, load_tokenizer(checkpoint_path))
    text = len(encoder.text_prefix_ids("x")) + max(len(ids) for ids in encoder.question_ids) + 1
    rng = random.Random(0)
    sizes = [(1, ratio) for ratio in range(1, 201)] + [
        (short, min(200 * short, int(short * rng.uniform(1, 201)))) for short in range(1, 400)
    ]
    longest = max(max(resized_size(height, width, spec)) for height, width in sizes) // side
    assert _reachable_positions(contract, encoder) >= text + longest


# --- kills


def _export(checkpoint: Path, output: Path, *, force: bool) -> list[str | Path]:
    return ["export", checkpoint, "-o", output, "--no-parity", *(["--force"] if force else [])]


@pytest.mark.slow
def test_killed_at_any_moment_an_export_leaves_a_good_bundle_or_none(
    checkpoint_path: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first" / "bundle"
    seconds = run_and_kill(_export(checkpoint_path, first, force=False), first)
    verify_bundle(first)

    rng = random.Random(20)
    leftovers = 0
    for attempt in range(6):
        replace = attempt % 2 == 1
        output = first if replace else tmp_path / f"new-{attempt}" / "bundle"
        run_and_kill(_export(checkpoint_path, output, force=replace), output, rng.uniform(0, 1.1 * seconds))
        leftovers += is_left(output)
        assert output.exists() or not replace, "the earlier bundle is gone"
        if output.exists():
            verify_bundle(output)
    assert leftovers >= 2, "it was killed too late to prove anything"

    run_and_kill(_export(checkpoint_path, first, force=True), first)
    verify_bundle(first)
    assert not is_left(first)
