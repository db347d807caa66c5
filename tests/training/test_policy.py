"""Samples are judged once, by the policy that sampled them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from zreward.training.config import ModelConfig
from zreward.training.model import RewardModel, load_model
from zreward.training.passes import RowOutputs
from zreward.training.policy import PolicyOptions, Samples, judged
from zreward.training.sequences import Row


@pytest.fixture(scope="module")
def model(reasoner: Path) -> RewardModel:
    return load_model(ModelConfig(str(reasoner)), torch.device("cpu"))


def outputs(log_probs_nk: Tensor, tokens_nt: Tensor) -> RowOutputs:
    n = len(log_probs_nk)
    valid = torch.ones(n, dtype=torch.bool)
    return RowOutputs(
        log_probs_nk.log_softmax(-1),
        valid,
        torch.zeros(n),
        tokens_nt,
        torch.ones_like(tokens_nt, dtype=torch.bool),
    )


@pytest.fixture
def samples(model: RewardModel) -> Samples:
    rows = [Row("a red ball", Path("ball.png"), 0, (1, 2))] * 6
    labels_pj = torch.tensor([[2.0, 4.0]])
    return Samples(rows, labels_pj, None, lambda out: judged(model, rows, out, labels_pj, PolicyOptions()))


def test_later_passes_are_held_against_the_first(samples: Samples) -> None:
    """With several updates on a batch the likelihood ratio is to the policy that sampled, not to the one before."""
    first = outputs(torch.randn(6, 9), torch.randn(6, 2, requires_grad=True))
    second = outputs(torch.randn(6, 9), torch.randn(6, 2, requires_grad=True))
    judgement = samples.judgement(first)
    assert samples.judgement(second) is judgement
    assert judgement.token_log_probs_nt.equal(first.token_log_probs_nt)
    assert not judgement.token_log_probs_nt.requires_grad
    assert not judgement.advantages_n.requires_grad
    assert samples.figures == judgement.figures


def test_the_better_of_a_group_has_the_larger_advantage(samples: Samples) -> None:
    """Labels 2 and 4: a sample that scores nearer to its side's label is worth more."""
    logits = torch.full((6, 9), -20.0)
    for row, score in enumerate((2.0, 3.0, 5.0, 4.0, 3.0, 1.0)):
        logits[row, round(2 * (score - 1))] = 20.0
    advantages = samples.judgement(outputs(logits, torch.zeros(6, 2))).advantages_n.view(2, 3)
    assert (advantages.diff(dim=1) < 0).all()
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
