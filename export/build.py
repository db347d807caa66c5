"""The main path: checkpoint to bundle.

Everything is written into a directory beside the final one and renamed at the end, so that a bundle under
its final name is complete, whenever the export was killed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

import zreward
from zreward.bundle import (
    GOLDEN_FILE,
    Bundle,
    EmbeddingInfo,
    FileEntry,
    GoldenInfo,
    Manifest,
    ModelInfo,
    StateInfo,
    file_entries,
    write_manifest,
)
from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import ExportError, UsageError
from zreward.export.graph import EMBEDDING, Graphs, graphs_from_checkpoint
from zreward.export.parity import golden_scores, parity_with_reference, write_golden_images
from zreward.export.passes.weight_storage import STORED_TYPES
from zreward.export.staging import staged_directory
from zreward.export.storage import graph_weight_bytes, write_embedding, write_graph
from zreward.export.targets.cpu import lower_to_cpu
from zreward.jsonfile import write_json
from zreward.prompt import TOKENIZER_FILE, PromptEncoder, load_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total), in bytes while weights are written."""

TARGETS = ("cpu",)
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
        if self.weights not in STORED_TYPES:
            raise UsageError(f"unknown weights {self.weights!r}; choose from {', '.join(STORED_TYPES)}")
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
        CheckpointError, ContractError: the input is incomplete or inconsistent; found before any work.
        ExportError: the graphs cannot be built, or the result is too far from transformers.
        UsageError: `output` exists, or an option is unknown.
    """
    options = options or ExportOptions()
    report = progress or (lambda stage, done, total: None)
    source = Checkpoint.open(checkpoint)
    contract = source.contract()
    encoder = PromptEncoder(contract, load_tokenizer(source.path))
    with staged_directory(Path(output), replace=options.force) as staging:
        report("building the graphs", 0, 1)
        graphs = graphs_from_checkpoint(source)
        lower_to_cpu(
            graphs,
            code_ids=encoder.code_ids,
            bins=contract.bins,
            n_positions=_reachable_positions(contract, encoder),
            stored_type=STORED_TYPES[options.weights],
            label_mass=options.label_mass,
        )
        report("building the graphs", 1, 1)
        states = _states(graphs.decoder)
        embedding = _write_files(source, contract, graphs, staging.path, report)
        manifest = _draft(source, contract, options, states, embedding, staging.path)
        manifest = _prove(source, contract, options, manifest, staging.path, report)
        write_manifest(staging.path, manifest)
        staging.commit()
    return Bundle.open(output)


def _write_files(
    source: Checkpoint, contract: ScoreContract, graphs: Graphs, path: Path, report: Progress
) -> EmbeddingInfo:
    embedding_bytes = source.info(EMBEDDING).n_bytes
    total = graph_weight_bytes(graphs.vision) + graph_weight_bytes(graphs.decoder) + embedding_bytes
    done = 0

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report("writing weights", done, total)

    write_graph(graphs.vision, path / "vision.onnx", wrote)
    write_graph(graphs.decoder, path / "decoder.onnx", wrote)
    embedding = write_embedding(source, path / "embedding.bin", wrote)
    contract.save(path)
    (path / TOKENIZER_FILE).write_bytes((source.path / TOKENIZER_FILE).read_bytes())
    return embedding


def _draft(
    source: Checkpoint,
    contract: ScoreContract,
    options: ExportOptions,
    states: tuple[StateInfo, ...],
    embedding: EmbeddingInfo,
    path: Path,
) -> Manifest:
    """The manifest before anything is proved: no parity, and files without hashes."""
    listed = {p.name: FileEntry(0, "") for p in path.iterdir()} | {GOLDEN_FILE: FileEntry(0, "")}
    packages = ("mobius-onnx", "onnx-ir", "onnxruntime")
    return Manifest(
        target=options.target,
        weights=options.weights,
        contract_sha256=contract.sha256,
        model=ModelInfo(str(source.config["model_type"]), source.n_parameters, embedding.shape[1]),
        graphs={"vision": "vision.onnx", "decoder": "decoder.onnx"},
        embedding=embedding,
        states=states,
        golden=GoldenInfo(GOLDEN_FILE, GOLDEN_TOLERANCE),
        label_mass=options.label_mass,
        versions={"zreward": zreward.__version__, **{name: version(name) for name in packages}},
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


def _states(decoder: ir.Model) -> tuple[StateInfo, ...]:
    """Each state input of the decoder with the output that continues it."""
    outputs = {value.name for value in decoder.graph.outputs}
    states = []
    for value in decoder.graph.inputs:
        if not str(value.name).startswith("past_key_values."):
            continue
        output = str(value.name).replace("past_key_values.", "present.", 1)
        if output not in outputs:
            raise ExportError(f"the decoder continues {value.name!r} in no output")
        shape = tuple(d if isinstance(d, int) else _dimension_name(str(d)) for d in value.shape or ())
        states.append(StateInfo(str(value.name), output, "float32", shape))
    return tuple(states)


def _dimension_name(symbol: str) -> str:
    return "past" if symbol.startswith("past") else "batch"


def _reachable_positions(contract: ScoreContract, encoder: PromptEncoder) -> int:
    """Positions of the longest sequence that the contract allows, rounded up to a multiple of 128.

    A prompt may have `max_prompt_tokens`; joining it to the text around it can only merge tokens, or split
    a few at the seams. An image advances the position by its longer side in tokens.
    """
    spec = contract.image
    side = spec.patch_size * spec.merge_size
    text = len(encoder.text_prefix_ids("x")) + contract.max_prompt_tokens
    image = max(spec.max_pixels, side * side) // (side * side)
    question = max(len(ids) for ids in encoder.question_ids)
    return 128 * math.ceil((text + image + question + 16) / 128)
