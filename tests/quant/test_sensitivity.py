"""What each unit costs in each format, and what a budget makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Batch, Item, batches
from zreward.quant.gradients import token_weights
from zreward.quant.network import Block, BlockNetwork
from zreward.quant.scheme import Scheme, Table, block_formats, resolve
from zreward.quant.sensitivity import Sensitivity, alternatives, measure, mixed_table
from zreward.quant.units import units_of


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def table(checkpoint: Checkpoint) -> Table:
    """Two of the four layers of the language model, one with each kind of attention, and the merger."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    others = ("visual.blocks.*", "language_model.layers.0.*", "language_model.layers.1.*")
    return resolve(Scheme.parse(",".join(["int4-g32", *(f"model.{name}=none" for name in others)])), shapes)


def measured(
    checkpoint: Checkpoint, encoder: PromptEncoder, table: Table, asked: Sequence[Batch], folder: Path
) -> list[Sensitivity]:
    network = BlockNetwork(checkpoint, encoder)

    def units(block: Block) -> list[tuple[str, ...]]:
        return [unit.layers for unit in units_of(block.kind, block_formats(table, block.prefix))]

    weights = token_weights(network, asked, units, folder, silent)
    return measure(network, asked, table, alternatives, weights, folder, silent)


def test_every_unit_is_measured_and_a_budget_is_kept(
    checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item], table: Table, tmp_path: Path
) -> None:
    asked = batches(items, encoder.contract, encoder, all_questions=True)
    found = measured(checkpoint, encoder, table, asked, tmp_path)
    assert sorted(layer for unit in found for layer in unit.layers) == sorted(table.formats)
    for unit in found:
        assert [(f.bits, f.group_size) for f in unit.kl] == [(4, 32), (4, 16), (8, 32), (8, 16)]
        assert all(kl > 0 for kl in unit.kl.values())
    coarse, *_, fine = found[0].kl
    assert sum(unit.kl[fine] for unit in found) < sum(unit.kl[coarse] for unit in found)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    mixed = mixed_table(table, found, 5.5, shapes)
    n_bits = sum(f.bits_per_weight(shapes[n][1]) * math.prod(shapes[n]) for n, f in mixed.formats.items())
    n_weights = sum(math.prod(shapes[name]) for name in mixed.formats)
    assert 5 < n_bits / n_weights <= 5.5
    cost = sum(unit.kl[mixed.formats[unit.layers[0]]] for unit in found)
    assert cost < sum(unit.kl[coarse] for unit in found)
    assert not list(tmp_path.iterdir())


def test_one_item_is_not_enough(
    checkpoint: Checkpoint, encoder: PromptEncoder, items: list[Item], table: Table, tmp_path: Path
) -> None:
    asked = batches(items[:1], encoder.contract, encoder, all_questions=True)
    with pytest.raises(QuantizationError, match="at least two calibration items"):
        measured(checkpoint, encoder, table, asked, tmp_path)
