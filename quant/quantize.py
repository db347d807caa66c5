"""Checkpoint to quantized weights: the driver that the algorithms are called from.

Round-to-nearest needs no data and goes tensor by tensor. The calibrated methods go block by block: the
activations that reach a block are those of the network whose earlier blocks are quantized already, each unit of
the block is quantized on what its input is by then, and only the activations between two blocks are kept. Before
that, a sweep through the unquantized network and back finds which tokens the scores depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, QuantizationError, UsageError
from zreward.progress import Progress
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.quant.calibrate import Batch, Item, batches
from zreward.quant.folding import smooth
from zreward.quant.gptq import quantize_gptq
from zreward.quant.gradients import token_weights
from zreward.quant.inputs import input_hessians, linear_of, quantize_inputs
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.ranges import MagnitudeHistogram
from zreward.quant.rtn import quantize_rtn
from zreward.quant.scheme import DEFAULT_GROUPS, Scheme, Table, block_formats, resolve
from zreward.quant.sensitivity import alternatives, measure, mixed_table
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.store import StoreWriter, open_store
from zreward.quant.tensor import QuantizedWeight, WeightFormat
from zreward.quant.units import units_of
from zreward.safetensors_file import float32_from_stored

METHODS = ("rtn", "gptq")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        scheme: see `zreward.quant.scheme`.
        method: "rtn", or "gptq", which needs calibration items; None takes gptq where there are items.
        budget: stored bits per quantized weight that the formats may be mixed up to, or None.
        device: where the calibrated methods run.
        groups: inputs that share a scale where the scheme does not say it, by format.
    """

    scheme: str = "int4"
    method: str | None = None
    budget: float | None = None
    device: str = "cpu"
    groups: Mapping[str, int] = field(default_factory=lambda: DEFAULT_GROUPS)

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; choose from {', '.join(METHODS)}")


def plan(checkpoint: Checkpoint, options: QuantizeOptions) -> Table:
    """The format of every tensor; cheap, so that a bad scheme is known before any work.

    Raises:
        QuantizationError: see `resolve`.
    """
    scheme = Scheme.parse(options.scheme, options.groups)
    return resolve(scheme, {n: i.shape for n, i in checkpoint.tensors.items()})


def quantize(
    checkpoint: Checkpoint,
    path: Path,
    options: QuantizeOptions,
    items: Sequence[Item] = (),
    progress: Progress | None = None,
) -> QuantizedCheckpoint:
    """Quantize `checkpoint` into a store at the existing, empty directory `path`.

    Raises:
        CheckpointError: a weight is missing, not finite, or the file is cut short.
        QuantizationError: the scheme does not fit the checkpoint, or the method needs calibration items.
    """
    report = progress or (lambda stage, done, total: None)
    method = options.method or ("gptq" if items else "rtn")
    if options.budget is not None and method == "rtn":
        raise QuantizationError(
            "a budget is spent by measurement; give --calibration FILE and no --method rtn"
        )
    if method != "rtn" and not items:
        raise QuantizationError(f"{method} needs calibration items; give --calibration FILE, or --method rtn")
    table = plan(checkpoint, options)
    if method == "rtn" and any(chosen.has_static_inputs for chosen in table.formats.values()):
        raise QuantizationError(
            "static scales of inputs come from calibration; give --calibration FILE and no --method rtn, or keep "
            "the inputs with int8-weight"
        )
    check_finite(checkpoint, report)
    writer = StoreWriter(path)
    if method == "rtn":
        _quantize_tensors(checkpoint, table, writer, report)
    else:
        with torch.no_grad():
            calibrated = _Calibrated(checkpoint, table, writer, options, items, report)
            if options.budget is not None:
                calibrated.spend(options.budget)
            calibrated.run()
        table = calibrated.table
    writer.finish(table.scheme, method, table.kept)
    return open_store(checkpoint, path)


def check_finite(checkpoint: Checkpoint, report: Progress) -> None:
    """Read every tensor once, so that a damaged checkpoint is refused before hours of work.

    Raises:
        CheckpointError: a value is NaN or infinite, or the file ends early.
    """
    total, done = sum(info.n_bytes for info in checkpoint.tensors.values()), 0
    for name, info in checkpoint.tensors.items():
        rows = max(1, 64_000_000 // max(1, info.n_bytes // max(1, info.shape[0] if info.shape else 1)))
        for start in range(0, info.shape[0] if info.shape else 1, rows):
            block = checkpoint.read_stored(name, start, start + rows)
            if not np.isfinite(float32_from_stored(block, info.dtype)).all():
                raise CheckpointError(
                    f"{checkpoint.path}: weight {name!r} holds NaN or infinity; the checkpoint is damaged or "
                    "its training diverged"
                )
            done += block.nbytes
            report("checking weights", done, total)


def _quantize_tensors(checkpoint: Checkpoint, table: Table, writer: StoreWriter, report: Progress) -> None:
    total, done = _n_bytes(checkpoint, table), 0
    for name, chosen in table.formats.items():
        values = torch.from_numpy(checkpoint.read(name))
        weight = _named(name, partial(quantize_rtn, values, chosen))
        writer.add(name, weight, relative_error(values, weight))
        done += checkpoint.info(name).n_bytes
        report("quantizing", done, total)


class _Calibrated:
    """GPTQ block by block, on statistics in which a token counts by what it moves the scores."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        table: Table,
        writer: StoreWriter,
        options: QuantizeOptions,
        items: Sequence[Item],
        report: Progress,
    ) -> None:
        contract = checkpoint.contract()
        encoder = PromptEncoder(contract, load_tokenizer(checkpoint.path))
        self.checkpoint, self.table, self.writer, self.report = checkpoint, table, writer, report
        self.network = BlockNetwork(checkpoint, encoder, options.device)
        self.batches: list[Batch] = batches(items, contract, encoder, all_questions=True)
        self.done, self.total = 0, _n_bytes(checkpoint, table)
        self.sensitivity: dict[str, float] = {}
        self.weights = token_weights(self.network, self.batches, self._units, writer.path, report)

    def run(self) -> None:
        self.report("quantizing", 0, self.total)
        states = [self.network.begin(batch) for batch in self.batches]
        for block in self.network.blocks:
            module = self.network.load(block)
            self._quantize_block(block, module, states)
            states = [self.network.step(block, module, state) for state in states]

    def spend(self, budget: float) -> None:
        """Choose formats by what they cost in the scores, within `budget` bits per weight."""
        units = measure(
            self.network,
            self.batches,
            self.table,
            alternatives,
            self.weights,
            self.writer.path,
            self.report,
        )
        shapes = {name: self.checkpoint.info(name).shape for name in self.table.formats}
        self.table = mixed_table(self.table, units, budget, shapes)
        for unit in units:
            name = unit.layers[0]
            fitted = {c.fitted(shapes[name][1]): kl for c, kl in unit.kl.items()}
            self.sensitivity |= dict.fromkeys(unit.layers, fitted[self.table.formats[name]])

    def _units(self, block: Block) -> list[tuple[str, ...]]:
        return [unit.layers for unit in units_of(block.kind, block_formats(self.table, block.prefix))]

    def _quantize_block(self, block: Block, module: nn.Module, states: list[Activations]) -> None:
        formats = block_formats(self.table, block.prefix)
        self._smooth_block(block, module, formats, states)
        for unit in units_of(block.kind, formats):
            first = unit.layers[0]
            activations = formats[first].activations
            histogram = MagnitudeHistogram() if formats[first].has_static_inputs else None
            found = input_hessians(self.network, block, module, [first], states, self.weights, histogram)
            hessian, scale = found[first], histogram.scale_for(activations) if histogram else None
            for layer in unit.layers:
                name = f"{block.prefix}{layer}.weight"
                linear = linear_of(module, layer)
                weight = _named(name, partial(quantize_gptq, linear.weight, hessian, formats[layer]))
                error = relative_error(linear.weight, weight)
                self.writer.add(name, weight, error, self.sensitivity.get(name), scale)
                linear.weight.data = torch.from_numpy(weight.dequantized()).to(linear.weight.device)
                self.done += self.checkpoint.info(name).n_bytes
                self.report("quantizing", self.done, self.total)
            if formats[first].rounds_inputs:
                hook = partial(quantize_inputs, activations=activations, scale=scale)
                for layer in unit.layers:
                    linear_of(module, layer).register_forward_pre_hook(hook)

    def _smooth_block(
        self,
        block: Block,
        module: nn.Module,
        formats: Mapping[str, WeightFormat],
        states: list[Activations],
    ) -> None:
        """Fold scales in front of every unit whose inputs become whole numbers, before any of its block is.

        Floats of 8 bits are as fine for a small channel as for a large one.
        """
        changed: set[str] = set()
        for unit in units_of(block.kind, formats):
            chosen = formats[unit.layers[0]]
            if chosen.rounds_inputs and not chosen.is_float8:
                found = smooth(self.network, block, module, unit, formats, states)
                changed.update(found.changed)
                names = [f"{block.prefix}{layer}.weight" for layer in unit.layers]
                self.writer.describe_inputs(names, found)
        for name in sorted(changed - {f"{layer}.weight" for layer in formats}):
            self.writer.replace(block.prefix + name, module.get_parameter(name).cpu().numpy())


def relative_error(values: Tensor, weight: QuantizedWeight) -> float:
    """‖W − Q‖ / ‖W‖ in the Frobenius norm; 0 for a matrix of zeros."""
    quantized = torch.from_numpy(weight.dequantized()).to(values.device)
    norm = float(torch.linalg.norm(values))
    return float(torch.linalg.norm(values - quantized)) / norm if norm else 0.0


def _named(name: str, run: Callable[[], QuantizedWeight]) -> QuantizedWeight:
    """What `run` returns; its errors get the tensor's name."""
    try:
        return run()
    except QuantizationError as error:
        raise QuantizationError(f"{name}: {error}") from None


def _n_bytes(checkpoint: Checkpoint, table: Table) -> int:
    return sum(checkpoint.info(name).n_bytes for name in table.formats)
