"""How the scores react to what each layer puts out: one sweep through the blocks, and one back.

To second order, a change Δz of the logits moves the scores by KL(p ‖ p') ≈ ½ Δzᵀ F Δz, with F = diag(p) − p pᵀ the
Fisher information of the bins. F is the sum over bins k of v_k v_kᵀ, v_k = √p_k (e_k − p); with random signs ε_k,
g = Σ ε_k v_k has the mean E[g gᵀ] = F, so that KL ≈ ½ E[(g · Δz)²]. And g · Δz follows from the gradient: where a
layer's output changes by ΔY, it is Σ_t δ_t · ΔY_t, with δ the gradient of g · z. One sweep back therefore tells what
any small change of any layer costs (the same expansion as in Optimal Brain Surgeon, Hassibi and Stork 1993; with
gradients per token, GuidedQuant, Kim et al. 2025).

Hidden states between blocks are kept in an unlinked file, so that memory does not grow with depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zreward.progress import Progress
from zreward.quant.calibrate import Batch
from zreward.quant.inputs import TokenWeights, linear_of
from zreward.quant.network import Activations, Block, BlockNetwork

STAGE = "measuring sensitivity"

PROBES = 4
"""Vectors g for each row."""

_FLOOR = 0.1
"""Part of its weight that a token has whatever its gradient: the statistics must hold beyond the calibration."""


@dataclass(frozen=True)
class Trace:
    """Layers with one input, for one batch in the sweep back.

    Attributes:
        batch: index of the batch.
        x: what the layers read, float32 [..., in]: in the decoder [rows, tokens, in], elsewhere [tokens, in].
        gradients: δ of each layer's output for each probe, float32 [probes, ..., out].
        items: index of the item of each row or image, [samples], that the leading axes fall into evenly.
    """

    batch: int
    x: Tensor
    gradients: Mapping[str, Tensor]
    items: NDArray[np.int64]

    def shifts(self, changes: Mapping[str, Tensor]) -> Tensor:
        """g · Δz [probes, samples] where the outputs of the layers change by `changes` [..., out]."""
        parts = [(changes[layer] * gradient).sum(-1) for layer, gradient in self.gradients.items()]
        tokens = torch.stack(parts).sum(0)
        return tokens.reshape(len(tokens), len(self.items), -1).sum(-1)


See = Callable[[Trace], None]
Prepare = Callable[[Block, nn.Module, Sequence[Activations]], Mapping[tuple[str, ...], See]]
"""Called with each block and the states in front of it, before the sweep passes it. It says which layers of the
block are watched, those with one input together."""


def sweep_back(
    network: BlockNetwork,
    batches: Sequence[Batch],
    prepare: Prepare,
    folder: Path,
    report: Progress,
    *,
    probes: int = PROBES,
    seed: int = 0,
) -> None:
    """Run `batches` forward, then go back block by block and show each watched layer its gradients.

    Args:
        network: the model.
        batches: inputs; each row asks one question.
        prepare: says which layers are watched, and by what. They are shown once a batch.
        folder: where hidden states may be kept meanwhile.
        report: hears of blocks that are done.
        probes: vectors g for each row.
        seed: of their signs.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = network.blocks
    report(STAGE, 0, len(blocks))
    with tempfile.TemporaryFile(dir=folder) as file, torch.enable_grad():
        spilled = _Spilled(file, network.device)
        gradients = _forward(network, batches, spilled, probes, generator)
        for done, index in enumerate(reversed(range(len(blocks))), start=1):
            block = blocks[index]
            module = network.load(block)
            states = [spilled.state(index, number) for number in range(len(batches))]
            with torch.no_grad():
                watched = prepare(block, module, states)
            for number, state in enumerate(states):
                gradients[number] = _back(
                    network, block, module, state, gradients[number], watched, number, last=index == 0
                )
            report(STAGE, done, len(blocks))


def directions(logits: Tensor, number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Vectors g for logits float64 [rows, bins], of the same shape, with E[g gᵀ] = diag(p) − p pᵀ in each row."""
    p = logits.softmax(-1)
    for _ in range(number):
        signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
        g = signs * p.sqrt()
        yield g - p * g.sum(-1, keepdim=True)


def token_weights(
    network: BlockNetwork,
    batches: Sequence[Batch],
    units: Callable[[Block], Sequence[Sequence[str]]],
    folder: Path,
    report: Progress,
) -> TokenWeights:
    """How much the outputs of each token move the scores, for statistics of what a layer reads.

    An error ΔY_t in the output at token t costs about E[(δ_t · ΔY_t)²]. Where the directions of δ are not told apart,
    that is ‖δ_t‖² for each output alike, and the Hessian of a layer is the sum of ‖δ_t‖² x_t x_tᵀ over its tokens.

    Args:
        network, batches, folder, report: see `sweep_back`.
        units: the layers of a block, those with one input together.
    """
    weights = TokenWeights()
    sums: dict[tuple[Block, tuple[str, ...]], dict[int, Tensor]] = {}

    def prepare(
        block: Block, module: nn.Module, states: Sequence[Activations]
    ) -> Mapping[tuple[str, ...], See]:
        def watch(layers: tuple[str, ...]) -> See:
            found = sums.setdefault((block, layers), {})

            def see(trace: Trace) -> None:
                squares = [gradient.square().sum((0, -1)) for gradient in trace.gradients.values()]
                found[trace.batch] = torch.stack(squares).sum(0).cpu()

            return see

        return {tuple(layers): watch(tuple(layers)) for layers in units(block)}

    sweep_back(network, batches, prepare, folder, report)
    for (block, layers), found in sums.items():
        valid = [_valid(batch, found[number]) for number, batch in enumerate(batches)]
        mean = sum(float(f.sum()) for f in found.values()) / sum(int(v.sum()) for v in valid)
        shares = [found[number] / mean if mean else torch.ones(()) for number in range(len(batches))]
        weights.put(
            block, layers, [((1 - _FLOOR) * s + _FLOOR) * v for s, v in zip(shares, valid, strict=True)]
        )
    return weights


def _valid(batch: Batch, like: Tensor) -> Tensor:
    """Which tokens of the leading axes [rows, tokens], or [tokens] in the vision tower, are real."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bool)
    return torch.arange(like.shape[1]) < torch.from_numpy(batch.lengths)[:, None]


def _forward(
    network: BlockNetwork,
    batches: Sequence[Batch],
    spilled: _Spilled,
    probes: int,
    generator: torch.Generator,
) -> list[list[Tensor]]:
    """Spill the state in front of every block; the gradients of the last one's output, by batch and probe."""
    with torch.no_grad():
        states = [network.begin(batch) for batch in batches]
        for index, block in enumerate(network.blocks):
            module = network.load(block)
            for number, state in enumerate(states):
                spilled.add(index, number, state)
            states = [network.step(block, module, state) for state in states]
    gradients = []
    for state in states:
        hidden = state.hidden.requires_grad_()
        logits = network.logits(replace(state, hidden=hidden))
        grads = []
        for direction in directions(logits.detach(), probes, generator):
            (grad,) = torch.autograd.grad(logits, hidden, direction, retain_graph=True)
            grads.append(grad)
        gradients.append(grads)
    return gradients


def _back(
    network: BlockNetwork,
    block: Block,
    module: nn.Module,
    state: Activations,
    gradients: list[Tensor],
    watched: Mapping[tuple[str, ...], See],
    number: int,
    *,
    last: bool,
) -> list[Tensor]:
    """Gradients of the input of `block`, one a probe, given those of its output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[layer], outputs[layer] = arguments[0].detach(), output

        return keep

    handles = [
        linear_of(module, layer).register_forward_hook(hook(layer)) for layers in watched for layer in layers
    ]
    try:
        hidden = state.hidden.requires_grad_()
        result = network.step(block, module, replace(state, hidden=hidden)).hidden
    finally:
        for handle in handles:
            handle.remove()
    items = state.batch.indices if state.valid is not None else state.batch.image_items
    targets = list(outputs.values()) if last else [*outputs.values(), hidden]
    if not targets:
        return []
    found = [torch.autograd.grad(result, targets, gradient, retain_graph=True) for gradient in gradients]
    with torch.no_grad():
        stacked = {layer: torch.stack([f[i] for f in found]) for i, layer in enumerate(outputs)}
        for layers, see in watched.items():
            see(Trace(number, inputs[layers[0]], {layer: stacked[layer] for layer in layers}, items))
    return [] if last else [f[-1] for f in found]


class _Spilled:
    """States in front of the blocks; their hidden tensors wait in a file."""

    def __init__(self, file: IO[bytes], device: torch.device) -> None:
        self._file, self._device = file, device
        self._states: dict[tuple[int, int], tuple[Activations, int]] = {}

    def add(self, block: int, batch: int, state: Activations) -> None:
        offset = self._file.seek(0, 2)
        np.save(self._file, state.hidden.cpu().numpy())
        self._states[block, batch] = replace(state, hidden=torch.empty(0)), offset

    def state(self, block: int, batch: int) -> Activations:
        state, offset = self._states[block, batch]
        self._file.seek(offset)
        return replace(state, hidden=torch.from_numpy(np.load(self._file)).to(self._device))
