"""What the sweep back predicts of a change must be what the change does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zreward.checkpoint import Checkpoint
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Batch, Item, batches
from zreward.quant.gradients import See, Trace, directions, sweep_back, token_weights
from zreward.quant.network import Activations, Block, BlockNetwork
from zreward.quant.units import _UNITS

CHANGED = (
    ("model.visual.blocks.0.", ("attn.qkv",), 1e-3, 0.3),
    ("model.visual.blocks.1.", ("mlp.linear_fc2",), 1e-3, 0.3),
    ("model.visual.merger.", ("linear_fc2",), 5e-4, 0.3),
    ("model.language_model.layers.0.", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), 3e-4, 0.02),
    (
        "model.language_model.layers.3.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        3e-4,
        0.02,
    ),
    ("model.language_model.layers.3.", ("mlp.down_proj",), 3e-4, 0.02),
)
"""Block, layers, size of the change, and tolerance: what the tower of this random model changes in the scores is
little more than float32 resolves, and a larger change is not linear any more."""


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def network(checkpoint: Checkpoint, encoder: PromptEncoder) -> BlockNetwork:
    return BlockNetwork(checkpoint, encoder)


@pytest.fixture(scope="module")
def asked(items: list[Item], encoder: PromptEncoder) -> list[Batch]:
    return batches(items, encoder.contract, encoder)


def logits(network: BlockNetwork, asked: Sequence[Batch], changes: Mapping[str, Tensor]) -> Tensor:
    """Of all rows, with `changes` added to the named weights; float64."""

    def read(name: str) -> np.ndarray[Any, Any]:
        values = network.checkpoint.read(name)
        return values + changes[name].numpy() if name in changes else values

    with torch.no_grad():
        states = [network.begin(batch) for batch in asked]
        for block in network.blocks:
            module = network.load(block, read)
            states = [network.step(block, module, state) for state in states]
        return torch.cat([network.logits(state) for state in states])


@pytest.mark.parametrize(("prefix", "layers", "size", "tolerance"), CHANGED)
def test_predicted_shifts_are_those_that_a_change_causes(
    prefix: str,
    layers: tuple[str, ...],
    size: float,
    tolerance: float,
    network: BlockNetwork,
    asked: list[Batch],
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for layer in layers:
        weight = torch.tensor(network.checkpoint.read(f"{prefix}{layer}.weight"))
        noise = torch.randn(weight.shape, generator=generator)
        changes[layer] = size * weight.norm() / noise.norm() * noise
    before = logits(network, asked, {})
    up, down = (
        logits(network, asked, {f"{prefix}{layer}.weight": sign * c for layer, c in changes.items()})
        for sign in (1, -1)
    )
    moved = (up - down) / 2

    found: list[Tensor] = []

    def prepare(
        block: Block, module: nn.Module, states: Sequence[Activations]
    ) -> Mapping[tuple[str, ...], See]:
        def see(trace: Trace) -> None:
            found.append(trace.shifts({layer: trace.x @ c.T for layer, c in changes.items()}))

        return {layers: see} if block.prefix == prefix else {}

    sweep_back(network, asked, prepare, tmp_path, silent, probes=3, seed=5)
    assert len(found) == len(asked) == 1, "the vectors below are drawn for one batch"
    vectors = directions(before, 3, torch.Generator().manual_seed(5))
    expected = torch.stack([(g * moved).sum(-1) for g in vectors])
    assert float(expected.norm()) > 1e-5
    assert float((found[0] - expected).norm()) < tolerance * float(expected.norm())
    assert not list(tmp_path.iterdir())


def test_directions_have_the_fisher_information_as_their_second_moment() -> None:
    z = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    p = z.softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    drawn = torch.stack(list(directions(z, 20_000, torch.Generator().manual_seed(0))))
    moment = (drawn[:, :, :, None] * drawn[:, :, None, :]).mean(0)
    assert float((moment - expected).abs().max()) < 0.01


def test_rows_that_share_an_image_share_its_gradient(
    network: BlockNetwork, items: list[Item], encoder: PromptEncoder, tmp_path: Path
) -> None:
    every = batches(items[:2], encoder.contract, encoder, all_questions=True)
    seen: list[Trace] = []

    def prepare(
        block: Block, module: nn.Module, states: Sequence[Activations]
    ) -> Mapping[tuple[str, ...], See]:
        layers = {"vision": "attn.proj", "merger": "linear_fc1", "decoder": "mlp.down_proj"}
        return {(layers[block.kind],): seen.append}

    sweep_back(network, every, prepare, tmp_path, silent, probes=1)
    assert {tuple(trace.items) for trace in seen if trace.x.ndim == 2} == {(0, 1)}
    assert {tuple(sorted(trace.items)) for trace in seen if trace.x.ndim == 3} == {(0, 0, 0, 0, 1, 1, 1, 1)}


def test_weights_of_tokens_average_to_one_and_leave_padding_out(
    network: BlockNetwork, items: list[Item], encoder: PromptEncoder, tmp_path: Path
) -> None:
    longer = dataclasses.replace(items[0], prompt="a rather longer prompt about one red cube and a blue ball")
    asked = batches([items[0], longer], encoder.contract, encoder)

    def units(block: Block) -> list[tuple[str, ...]]:
        names = dict(network.load(block).named_modules())
        return [unit.layers for unit in _UNITS[block.kind] if set(unit.layers) <= set(names)]

    weights = token_weights(network, asked, units, tmp_path, silent)
    for block in network.blocks:
        for layers in units(block):
            (found,) = (weights.of(block, layers[0], number) for number in range(len(asked)))
            assert torch.equal(weights.of(block, layers[-1], 0), found)
            assert bool((found >= 0).all())
            if block.kind == "decoder":
                padding = torch.arange(found.shape[1]) >= torch.from_numpy(asked[0].lengths)[:, None]
                assert bool(padding.any()) and bool((found[padding] == 0).all())
                found = found[~padding]
            assert float(found.mean()) == pytest.approx(1, rel=1e-4)
            assert float(found.min()) > 0
    last = weights.of(network.blocks[-1], "mlp.down_proj", 0)
    rows = torch.arange(len(last))
    ends = torch.from_numpy(asked[0].lengths - 1)
    assert bool((last[rows, ends] == last.amax(1)).all()), "behind the last layer only the answers count"
