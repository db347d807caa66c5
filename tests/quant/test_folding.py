"""Folding scales must leave the block's output as it was, for every place where they can be folded."""

from __future__ import annotations

import pytest
import torch

from zreward.checkpoint import Checkpoint
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Item, batches
from zreward.quant.folding import fold, repeats, smooth
from zreward.quant.inputs import linear_of
from zreward.quant.network import BlockNetwork
from zreward.quant.tensor import WeightFormat
from zreward.quant.units import units_of

INT8 = WeightFormat(8, activations="int8")


@pytest.mark.parametrize("index", [0, 2, 3, 6], ids=["vision", "merger", "DeltaNet", "attention"])
def test_folded_scales_cancel(
    index: int, checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item]
) -> None:
    network = BlockNetwork(checkpoint, encoder)
    generator = torch.Generator().manual_seed(index)
    with torch.inference_mode():
        states = [network.begin(batch) for batch in batches(items, encoder.contract, encoder)]
        for block in network.blocks[:index]:
            states = [network.step(block, network.load(block), state) for state in states]
        block = network.blocks[index]
        module = network.load(block)
        before = network.step(block, module, states[0]).hidden
        layers = [n.removesuffix(".weight") for n, p in module.named_parameters() if p.ndim == 2]
        units = [unit for unit in units_of(block.kind, dict.fromkeys(layers, INT8)) if unit.fold]
        assert units
        for unit in units:
            times = repeats(module, unit)
            inputs = linear_of(module, unit.layers[0]).in_features
            scales = torch.exp(torch.randn(inputs // times, generator=generator)).repeat(times)
            changed = fold(module, unit, scales)
            assert f"{unit.fold}.weight" in changed
        after = network.step(block, module, states[0]).hidden
    assert float((after - before).abs().max()) < 2e-4 * float(before.abs().max())


def test_layers_of_one_input_in_two_formats_are_two_units() -> None:
    int4 = WeightFormat(4, 16)
    formats = {"self_attn.q_proj": INT8, "self_attn.k_proj": int4, "self_attn.v_proj": INT8}
    first, second = units_of("decoder", formats)
    assert (first.layers, first.others) == (("self_attn.q_proj", "self_attn.v_proj"), ("self_attn.k_proj",))
    assert (second.layers, second.others) == (("self_attn.k_proj",), ("self_attn.q_proj", "self_attn.v_proj"))


def test_smoothing_never_makes_the_rounding_of_a_layer_worse(
    checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item]
) -> None:
    """A loud channel in front of the feed-forward is taken out of the rows; the statistics say so."""
    network = BlockNetwork(checkpoint, encoder)
    with torch.inference_mode():
        states = [network.begin(batch) for batch in batches(items, encoder.contract, encoder)]
        block = network.blocks[0]
        module = network.load(block)
        module.get_parameter("norm2.weight").data[7] *= 80
        unit = units_of("vision", {"mlp.linear_fc1": INT8})[0]
        found = smooth(network, block, module, unit, {"mlp.linear_fc1": INT8}, states)
    assert found.alpha > 0
    assert found.before.channel_ratio > 3 * found.after.channel_ratio
    assert set(found.changed) == {"norm2.weight", "norm2.bias"}
