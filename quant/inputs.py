"""What a layer reads: watched for statistics, and quantized as the runtime will quantize it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zreward.quant.calibrate import Batch
from zreward.quant.gptq import HessianAccumulator
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.ranges import MagnitudeHistogram, fake_quantize_static
from zreward.quant.scaling import fake_quantize_blocks, fake_quantize_inputs, fake_quantize_rows
from zreward.quant.tensor import WeightFormat

Items = NDArray[np.int64]


def input_hessians(
    network: BlockNetwork,
    block: Block,
    module: nn.Module,
    layers: Sequence[str],
    states: Sequence[Activations],
    weights: TokenWeights,
    histogram: MagnitudeHistogram | None = None,
) -> dict[str, Tensor]:
    """The second moments of the inputs of `layers`, each token with its weight: float [in, in] each.

    Where it is given, `histogram` takes in the inputs of the first layer, with the same weights.
    """
    found = {}
    for layer in layers:
        found[layer] = HessianAccumulator(linear_of(module, layer).in_features, network.device)
    for number, state in enumerate(states):
        with ExitStack() as watches:
            for layer, accumulator in found.items():
                mask = weights.of(block, layer, number)
                sees = [accumulator.add]
                if histogram is not None and layer == layers[0]:
                    sees.append(histogram.add)
                for see in sees:
                    watches.enter_context(watched_input(linear_of(module, layer), partial(see, mask=mask)))
            network.step(block, module, state)
    return {layer: accumulator.hessian for layer, accumulator in found.items()}


def linear_of(module: nn.Module, layer: str) -> nn.Linear:
    """The linear layer of a block by its name within the block."""
    linear = module.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    return linear


class TokenWeights:
    """How much each token counts in the statistics of a layer's input.

    For each layer and batch a tensor of the shape of the input's leading axes; its mean over real tokens is 1, and
    0 is for padding.
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[Block, str], list[Tensor]] = {}

    def of(self, block: Block, layer: str, batch: int) -> Tensor:
        return self._weights[block, layer][batch]

    def of_items(self, batches: Sequence[Batch], kept: Callable[[Items], NDArray[np.bool_]]) -> TokenWeights:
        """The same with 0 for tokens of items that are not kept; `kept` tells for an array of item indices."""
        masked = TokenWeights()
        for (block, layer), weights in self._weights.items():
            parts = []
            for batch, weight in zip(batches, weights, strict=True):
                items = batch.indices if block.kind == "decoder" else batch.image_items
                mask = torch.from_numpy(kept(items))[:, None]
                parts.append((weight.reshape(len(items), -1) * mask).reshape(weight.shape))
            masked.put(block, [layer], parts)
        return masked

    def put(self, block: Block, layers: Sequence[str], batches: Sequence[Tensor]) -> None:
        """The weights of layers that read one input, a tensor a batch."""
        self._weights |= {(block, layer): list(batches) for layer in layers}


@contextmanager
def watched_input(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see` with what `module` is given while the context lasts."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        see(arguments[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def quantize_inputs(
    _: nn.Module, arguments: tuple[Tensor, ...], activations: str, scale: float | None = None
) -> tuple[Tensor, ...]:
    """A forward pre-hook: the layer reads its input as 8-bit rows, or with a static scale."""
    x = arguments[0]
    read = fake_quantize_rows(x) if scale is None else fake_quantize_static(x, scale, activations)
    return (read, *arguments[1:])


def rounded(x: Tensor, chosen: WeightFormat) -> Tensor:
    """What the runtime's product reads in place of x [..., in], with weights of a format.

    Where inputs are quantized too, these are rows of 8 bits, or all inputs on one grid. Products that dequantize their
    weights round their inputs too: MatMulNBits of ONNX Runtime with accuracy level 4, to 8 bits with a scale for each
    group of inputs.
    """
    if chosen.rounds_inputs:
        return fake_quantize_inputs(x, chosen.activations)
    return fake_quantize_blocks(x, chosen.group_size) if chosen.group_size else x
