"""Checkpoint to graph files: build, lower for the target, stream the weights out.

Imports mobius and with it torch. An export runs this in a process of its own (`zreward.export.worker`).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from zreward.bundle import StateInfo
from zreward.checkpoint import Checkpoint
from zreward.errors import ExportError
from zreward.export.graph import EMBEDDING, graphs_from_checkpoint
from zreward.export.job import Lowered, LoweringJob, QuantizationJob
from zreward.export.passes.state_rows import STATE_BATCH
from zreward.export.passes.weight_storage import STORED_TYPES
from zreward.export.storage import graph_weight_bytes, write_embedding, write_graph
from zreward.export.targets import LOWERINGS
from zreward.export.work import work_or_none
from zreward.progress import Progress
from zreward.quant.formats import open_checkpoint
from zreward.quant.source import QuantizedCheckpoint


def lower_checkpoint(job: LoweringJob, report: Progress) -> Lowered:
    """Write `vision.onnx`, `decoder.onnx`, their weights and `embedding.bin` into `job.output`.

    Raises:
        CheckpointError: a weight is missing or the file is cut short.
        ExportError: the graphs cannot be built, or a weight is not finite or out of the stored range.
    """
    source, path = open_checkpoint(job.checkpoint), Path(job.output)
    if job.quantization is not None:
        source = _quantized(source, job.quantization, report)
    quantized = source.weights if isinstance(source, QuantizedCheckpoint) else None
    report("building the graphs", 0, 1)
    graphs = graphs_from_checkpoint(source)
    LOWERINGS[job.target](
        graphs,
        code_ids=job.code_ids,
        bins=job.bins,
        n_positions=job.n_positions,
        stored_type=STORED_TYPES[job.weights],
        label_mass=job.label_mass,
        quantized=quantized,
    )
    states, work = _states(graphs.decoder), work_or_none(graphs)
    report("building the graphs", 1, 1)

    embedding_bytes = source.info(EMBEDDING).n_bytes
    weight_bytes = graph_weight_bytes(graphs.vision) + graph_weight_bytes(graphs.decoder)
    total = weight_bytes + embedding_bytes
    done = 0

    def wrote(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report("writing weights", done, total)

    write_graph(graphs.vision, path / "vision.onnx", wrote)
    write_graph(graphs.decoder, path / "decoder.onnx", wrote)
    embedding = write_embedding(source, path / "embedding.bin", wrote)
    return Lowered(states, embedding, weight_bytes, quantized.summary() if quantized else None, work)


def _quantized(source: Checkpoint, job: QuantizationJob, report: Progress) -> QuantizedCheckpoint:
    """Quantize into the job's store; the calibrated methods import torch's model code, so only here."""
    from zreward.quant.calibrate import calibration_items
    from zreward.quant.quantize import QuantizeOptions, quantize

    options = QuantizeOptions(job.scheme, job.method, job.budget, job.device, job.groups)
    items = calibration_items(job.calibration) if job.calibration else ()
    return quantize(source, Path(job.store), options, items, report)


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
    if symbol == STATE_BATCH:
        return symbol
    return "past" if symbol.startswith("past") else "batch"
