"""What a layer reads: watched for statistics, and quantized as the runtime will quantize it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from zreward.quant.gptq import HessianAccumulator
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.scaling import fake_quantize_rows


def input_hessian(
    network: BlockNetwork, block: Block, module: nn.Module, layer: str, states: Sequence[Activations]
) -> Tensor:
    """The second moments of the input of `layer` over all real tokens, float [in, in]."""
    watched = linear_of(module, layer)
    accumulator = HessianAccumulator(watched.in_features, network.device)
    for state in states:
        with watched_input(watched, partial(_add, accumulator, state.valid)):
            network.step(block, module, state)
    return accumulator.hessian


def linear_of(module: nn.Module, layer: str) -> nn.Linear:
    """The linear layer of a block by its name within the block."""
    linear = module.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    return linear


def _add(accumulator: HessianAccumulator, valid: Tensor | None, x: Tensor) -> None:
    accumulator.add(x if valid is None else x[valid])


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


def quantize_inputs(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook: the layer reads its input as 8-bit rows."""
    return (fake_quantize_rows(arguments[0]), *arguments[1:])
