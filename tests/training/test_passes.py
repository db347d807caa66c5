"""A loss that couples rows has one gradient, in however many pieces they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from zreward.training import losses
from zreward.training.config import ModelConfig
from zreward.training.data import load_training_set
from zreward.training.model import load_model, trainable
from zreward.training.passes import RowOutputs, backward
from zreward.training.sequences import Row


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pieces_add_up(reference_student: Path, scenes: Path, checkpointing: bool) -> None:
    config = ModelConfig(str(reference_student), gradient_checkpointing=checkpointing)
    model = load_model(config, torch.device("cpu")).train()
    data = load_training_set(scenes, model.contract)
    encoder = model.collator.encoder
    traces = [encoder.trace_ids(text).tolist() for text in ("red ball", "one blue cube", "cone")]
    rows = [
        Row(data.items[item].prompt, data.items[item].image, 1, (*trace, encoder.code_ids[k]))
        for item in (0, 1)
        for k, trace in enumerate(traces)
    ]
    rows[4] = Row(rows[4].prompt, rows[4].image, 1, tuple(traces[1][:3]))  # a failed one
    scores_pj = torch.tensor([[4.5, 2.0]])
    advantages_n = torch.tensor([1.0, -0.5, -0.5, 0.7, 0.0, -0.7])

    def loss_of(out: RowOutputs) -> Tensor:
        log_probs = out.log_probs_nk.view(1, 2, 3, -1)
        valid = out.valid_n.view(1, 2, 3)
        means = losses.expectation(log_probs, model.bins)
        return (
            losses.pairwise_loss(means, scores_pj, 4.0, valid)
            + losses.pointwise_loss(log_probs, losses.bin_targets(scores_pj, model.bins), valid)
            + losses.policy_loss(
                out.token_log_probs_nt, out.token_log_probs_nt.detach(), advantages_n, out.mask_nt
            )
        )

    def gradient(micro_batch: int) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = backward(model, model, rows, micro_batch, loss_of)
        return loss, torch.cat([p.grad.flatten() for _, p in trainable(model) if p.grad is not None])

    whole_loss, whole = gradient(6)
    assert whole.norm() > 0.1
    for size in (1, 4):
        loss, pieces = gradient(size)
        assert loss == pytest.approx(whole_loss, abs=1e-5)
        assert (pieces - whole).norm() < 1e-4 * whole.norm()
