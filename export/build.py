"""The main path: checkpoint to bundle.

Everything is written into a directory beside the final one and renamed at the end, so that a bundle under
its final name is complete, whenever the export was killed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import zreward
from zreward.bundle import (
    GOLDEN_FILE,
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
from zreward.export.job import TARGETS, WEIGHT_TYPES, Lowered, LoweringJob, Progress
from zreward.export.parity import golden_scores, parity_with_reference, write_golden_images
from zreward.export.staging import staged_directory
from zreward.export.worker import lower_in_child
from zreward.image import MAX_ASPECT_RATIO
from zreward.jsonfile import write_json
from zreward.prompt import TOKENIZER_FILE, PromptEncoder, load_tokenizer

GOLDEN_TOLERANCE = 2e-3
"""Bin probabilities move by about 1e-6 between processors in float32; a wrong weight moves them by 0.1."""
PARITY_LIMITS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
"""A bundle further than this from transformers is not written: the graph is then wrong, not rounded."""
PARITY_MAX_PARAMETERS = 300_000_000
"""Above it, parity runs only when asked for: transformers needs 4 bytes a parameter beside the engine."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        weights: stored type of the weight matrices: "fp32", "fp16" or "bf16"; computation is float32.
        target: the runtime to lower for.
        label_mass: also output how much of the vocabulary's probability the codes hold.
        parity: compare with transformers; None does so up to 300 million parameters.
        force: replace an existing bundle.
    """

    weights: str = "fp32"
    target: str = "cpu"
    label_mass: bool = False
    parity: bool | None = None
    force: bool = False

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
    source = Checkpoint.open(checkpoint)
    contract = source.contract()
    encoder = PromptEncoder(contract, load_tokenizer(source.path))
    _check_tokenizer(source, encoder)
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
        lowered = lower_in_child(job, report)
        contract.save(staging.path)
        (staging.path / TOKENIZER_FILE).write_bytes((source.path / TOKENIZER_FILE).read_bytes())
        draft = _draft(source, contract, options, lowered, versions, staging.path)
        write_manifest(staging.path, _prove(source, contract, options, draft, staging.path, report))
        staging.commit()
    return Bundle.open(output)


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
    options: ExportOptions,
    lowered: Lowered,
    versions: Mapping[str, str],
    path: Path,
) -> Manifest:
    """The manifest before anything is proved: no parity, and files without hashes."""
    listed = {p.name: FileEntry(0, "") for p in path.iterdir()} | {GOLDEN_FILE: FileEntry(0, "")}
    return Manifest(
        target=options.target,
        weights=options.weights,
        contract_sha256=contract.sha256,
        model=ModelInfo(str(source.config["model_type"]), source.n_parameters, lowered.embedding.shape[1]),
        graphs={"vision": "vision.onnx", "decoder": "decoder.onnx"},
        embedding=lowered.embedding,
        states=lowered.states,
        golden=GoldenInfo(GOLDEN_FILE, GOLDEN_TOLERANCE),
        label_mass=options.label_mass,
        versions=versions,
        files=listed,
    )


def _prove(
    source: Checkpoint,
    contract: ScoreContract,
    options: ExportOptions,
    draft: Manifest,
    path: Path,
    report: Progress,
) -> Manifest:
    """Score the golden inputs, compare with transformers if that is asked for, hash every file."""
    report("scoring golden inputs", 0, 1)
    bundle = Bundle(path, draft, contract, sha256="")
    names = write_golden_images(path, contract.image)
    golden = golden_scores(bundle, names)
    write_json(path / GOLDEN_FILE, {"items": [dataclasses.asdict(item) for item in golden.items]})
    report("scoring golden inputs", 1, 1)
    parity = None
    with_parity = options.parity
    if with_parity is None:
        with_parity = source.n_parameters <= PARITY_MAX_PARAMETERS
    if with_parity:
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
    return dataclasses.replace(draft, parity=parity, files=file_entries(path))


def _reachable_positions(contract: ScoreContract, encoder: PromptEncoder) -> int:
    """Positions of the longest sequence that the contract allows, rounded up to a multiple of 128.

    A prompt may have `max_prompt_tokens`; joining it to the text around it can only merge tokens, or split
    a few at the seams. An image advances the position by its longer side in tokens, and a thin image can
    be longer than a square one has tokens.
    """
    spec = contract.image
    side = spec.patch_size * spec.merge_size
    text = len(encoder.text_prefix_ids("x")) + contract.max_prompt_tokens
    n_tokens = math.ceil(spec.max_pixels / side**2)
    image = max(n_tokens, math.ceil(math.sqrt(MAX_ASPECT_RATIO * n_tokens)))
    question = max(len(ids) for ids in encoder.question_ids)
    return 128 * math.ceil((text + image + question + 16) / 128)
