"""The main path: checkpoint to bundle.

Everything is written into a directory beside the final one and renamed at the end, so that a bundle under
its final name is complete, whenever the export was killed.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import zreward
from zreward.bundle import (
    GOLDEN_FILE,
    NARROW_TARGETS,
    Bundle,
    FileEntry,
    GoldenInfo,
    Manifest,
    ModelInfo,
    file_entries,
    write_manifest,
)
from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import BackendError, CheckpointError, ExportError, UsageError
from zreward.export.job import TARGETS, WEIGHT_TYPES, Lowered, LoweringJob
from zreward.export.parity import golden_scores, parity_with_reference, write_golden_images
from zreward.export.quantized import (
    QuantizationOptions,
    QuantizationPlan,
    judge,
    plan_quantization,
    probabilities,
    write_drift,
)
from zreward.export.worker import lower_in_child
from zreward.jsonfile import write_json
from zreward.lengths import longest_parts
from zreward.progress import Progress
from zreward.prompt import TOKENIZER_FILE, PromptEncoder, load_tokenizer
from zreward.quant.formats import open_checkpoint
from zreward.quant.source import QuantizedCheckpoint
from zreward.staging import staged_directory

GOLDEN_TOLERANCE = 2e-3
"""Bin probabilities move by about 1e-6 between processors in float32; a wrong weight moves them by 0.1."""
NARROW_TOLERANCES = {"fp16": 2e-2, "bf16": 5e-2}
"""Of graphs that compute in 16 bits, where a GPU sums in another order than the processor that proved the bundle."""
QUANTIZED_TOLERANCE = 5e-2
"""Sums of whole numbers are exact everywhere, but a scale that differs in its last bit moves a rounding. With and
without the compiled kernels, int8 moves them by 1.1e-2 on the reference student, 4.0e-2 on random 0.8B weights."""
_STORE = "quantized"
PARITY_LIMITS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""A bundle further than this from transformers is not written: the graph is then wrong, not rounded."""
PARITY_MAX_PARAMETERS = 300_000_000
"""Above it, parity runs only when asked for: transformers needs 4 bytes a parameter beside the engine."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        weights: stored type of the weight matrices: "fp32", "fp16" or "bf16"; the targets "cuda" and "tensorrt"
            multiply them in that type, all others in float32.
        target: the runtime to lower for.
        label_mass: also output how much of the vocabulary's probability the codes hold.
        parity: compare with transformers; None does so up to 300 million parameters.
        force: replace an existing bundle.
        quantization: None exports the weights as the checkpoint has them.
    """

    weights: str = "fp32"
    target: str = "cpu"
    label_mass: bool = False
    parity: bool | None = None
    force: bool = False
    quantization: QuantizationOptions | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_TYPES:
            raise UsageError(f"unknown weights {self.weights!r}; choose from {', '.join(WEIGHT_TYPES)}")
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}; this version has {', '.join(TARGETS)}")


def export_bundle(
    checkpoint: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export `checkpoint` to the bundle directory `output`.

    Args:
        checkpoint: directory with config, safetensors weights, tokenizer and `contract.json`, or the
            `owner/name` of a model on the hub that has them.
        output: the bundle to write; must not exist, unless `options.force`.
        options: how to export.
        progress: hears of each stage.

    Raises:
        BackendError: no backend is installed to prove the bundle with.
        CheckpointError, ContractError: the input is incomplete or inconsistent; found before any work.
        ExportError: the graphs cannot be built, or the result is too far from transformers.
        UsageError: `output` exists, or an option is unknown.
    """
    options = options or ExportOptions()
    report = progress or (lambda stage, done, total: None)
    versions = _versions()
    source = open_checkpoint(checkpoint)
    contract = source.contract()
    encoder = PromptEncoder(contract, load_tokenizer(source.path))
    _check_tokenizer(source, encoder)
    if options.parity and (options.quantization or isinstance(source, QuantizedCheckpoint)):
        raise UsageError(
            "--parity compares float weights with transformers; a quantized bundle is judged by its drift"
        )
    plan = plan_quantization(source, options.quantization, options.target) if options.quantization else None
    with staged_directory(Path(output), replace=options.force) as staging:
        job = LoweringJob(
            checkpoint=str(source.path),
            output=str(staging.path),
            target=options.target,
            weights=options.weights,
            label_mass=options.label_mass,
            code_ids=encoder.code_ids,
            bins=contract.bins,
            n_positions=_reachable_positions(contract, encoder),
        )
        before = _score_unquantized(source, job, plan, versions, report) if plan else None
        bundle, lowered = _lower(source, _quantizing(job, plan), versions, report)
        shutil.rmtree(staging.path / _STORE, ignore_errors=True)
        manifest = _prove(source, options, bundle, report)
        if plan and before:
            write_drift(bundle, judge(bundle, plan, *before, lowered, report))
        write_manifest(staging.path, dataclasses.replace(manifest, files=file_entries(staging.path)))
        staging.commit()
    return Bundle.open(output)


def _lower(
    source: Checkpoint, job: LoweringJob, versions: Mapping[str, str], report: Progress
) -> tuple[Bundle, Lowered]:
    """The graphs and everything else that scoring needs, as a bundle that is not yet proved."""
    lowered = lower_in_child(job, report)
    path, contract = Path(job.output), source.contract()
    contract.save(path)
    (path / TOKENIZER_FILE).write_bytes((source.path / TOKENIZER_FILE).read_bytes())
    draft = _draft(source, contract, job, lowered, versions)
    return Bundle(path, draft, contract, sha256=""), lowered


def _score_unquantized(
    source: Checkpoint,
    job: LoweringJob,
    plan: QuantizationPlan,
    versions: Mapping[str, str],
    report: Progress,
) -> tuple[NDArray[np.float64], int] | None:
    """Probabilities of the held-out items before quantization, and the bytes of the weights."""
    if not plan.held_out:
        return None
    with tempfile.TemporaryDirectory(dir=job.output) as folder:
        unquantized = dataclasses.replace(job, output=folder, target="cpu", label_mass=False)
        bundle, lowered = _lower(source, unquantized, versions, report)
        stage = "scoring the unquantized model"
        return probabilities(bundle, plan.held_out, stage, report), lowered.weight_bytes


def _quantizing(job: LoweringJob, plan: QuantizationPlan | None) -> LoweringJob:
    """The job with its quantization, whose store lies inside the staged directory until it is lowered."""
    if plan is None:
        return job
    store = Path(job.output) / _STORE
    store.mkdir()
    return dataclasses.replace(job, quantization=plan.job(store))


def _versions() -> dict[str, str]:
    """Versions of what makes and proves the bundle; onnxruntime is a module of several distributions."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "an export scores its golden inputs and needs onnxruntime; install `pip install 'zreward[cpu]'`"
        ) from None
    packages = {name: version(name) for name in ("mobius-onnx", "onnx-ir")}
    return {"zreward": zreward.__version__, **packages, "onnxruntime": onnxruntime.__version__}


def _check_tokenizer(source: Checkpoint, encoder: PromptEncoder) -> None:
    """The placeholder of an image must be the model's: another model's tokenizer would score nonsense."""
    expected = source.config.get("image_token_id")
    if expected is not None and expected != encoder.image_token_id:
        token = encoder.contract.template.image_token
        raise CheckpointError(
            f"{source.path}: {token!r} is token {encoder.image_token_id} of {TOKENIZER_FILE}, but config.json "
            f"has image_token_id {expected}; this is not the tokenizer that the model was trained with"
        )


def _draft(
    source: Checkpoint,
    contract: ScoreContract,
    job: LoweringJob,
    lowered: Lowered,
    versions: Mapping[str, str],
) -> Manifest:
    """The manifest before anything is proved: no parity, and files without hashes."""
    files = (p for p in Path(job.output).iterdir() if p.is_file())
    listed = {p.name: FileEntry(0, "") for p in files} | {GOLDEN_FILE: FileEntry(0, "")}
    tolerance = QUANTIZED_TOLERANCE
    if lowered.quantization is None:
        narrow = NARROW_TOLERANCES if job.target in NARROW_TARGETS else {}
        tolerance = narrow.get(job.weights, GOLDEN_TOLERANCE)
    return Manifest(
        target=job.target,
        weights=job.weights,
        contract_sha256=contract.sha256,
        model=ModelInfo(str(source.config["model_type"]), source.n_parameters, lowered.embedding.shape[1]),
        graphs={"vision": "vision.onnx", "decoder": "decoder.onnx"},
        embedding=lowered.embedding,
        states=lowered.states,
        golden=GoldenInfo(GOLDEN_FILE, tolerance),
        label_mass=job.label_mass,
        versions=versions,
        files=listed,
        quantization=lowered.quantization,
        work=lowered.work,
    )


def _prove(source: Checkpoint, options: ExportOptions, bundle: Bundle, report: Progress) -> Manifest:
    """Score the golden inputs, and compare with transformers if that is asked for."""
    report("scoring golden inputs", 0, 1)
    names = write_golden_images(bundle.path, bundle.contract.image)
    golden = golden_scores(bundle, names)
    write_json(bundle.path / GOLDEN_FILE, {"items": [dataclasses.asdict(item) for item in golden.items]})
    report("scoring golden inputs", 1, 1)
    with_parity = options.parity
    if with_parity is None:
        with_parity = source.n_parameters <= PARITY_MAX_PARAMETERS
    if not with_parity or bundle.manifest.quantization is not None:
        return bundle.manifest
    report("comparing with transformers", 0, 1)
    parity = parity_with_reference(source.path, bundle, golden)
    limit = PARITY_LIMITS[options.weights]
    if not parity.max_difference <= limit:
        raise ExportError(
            f"{source.path}: the exported graph differs from transformers by "
            f"{parity.max_difference:.2e} in a bin probability, more than {limit:.0e}; no bundle was "
            "written. Please report this with the checkpoint's config.json"
        )
    report("comparing with transformers", 1, 1)
    return dataclasses.replace(bundle.manifest, parity=parity)


def _reachable_positions(contract: ScoreContract, encoder: PromptEncoder) -> int:
    """Positions of the longest sequence that the contract allows, rounded up to a multiple of 128."""
    return 128 * math.ceil(longest_parts(contract, encoder).total / 128)
