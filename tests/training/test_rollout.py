"""Sampled outputs: groups, reproducible, ended by their answer, and from the model's own distribution."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zreward.errors import UsageError
from zreward.training.config import ModelConfig
from zreward.training.data import load_training_set
from zreward.training.model import RewardModel, banned_ids, load_model
from zreward.training.passes import run_rows
from zreward.training.rollout import Sampling, sample_outputs
from zreward.training.sequences import Row


@pytest.fixture(scope="module")
def model(reasoner: Path) -> RewardModel:
    return load_model(ModelConfig(str(reasoner)), torch.device("cpu"))


@pytest.fixture(scope="module")
def questions(scenes: Path, model: RewardModel) -> list[Row]:
    data = load_training_set(scenes, model.contract)
    return [Row(data.items[i].prompt, data.items[i].image, d) for i, d in ((0, 0), (4, 2), (9, 1))]


def test_groups_end_with_their_answers(model: RewardModel, questions: list[Row]) -> None:
    groups = sample_outputs(model, questions, Sampling(5, 24), seed=0, micro_batch=8)
    assert [len(group) for group in groups] == [5, 5, 5]
    for question, group in zip(questions, groups, strict=True):
        for row in group:
            assert replace(row, output=None) == question
            assert row.output is not None
            place = model.collator._reader.answer_position(row.output)
            assert place is None or place == len(row.output) - 1
    answered = [
        row for group in groups for row in group if model.collator._reader.answer_position(row.output)
    ]
    assert len(answered) >= 10


def test_the_same_seed_gives_the_same_samples(model: RewardModel, questions: list[Row]) -> None:
    first, again, other = (
        sample_outputs(model, questions, Sampling(3, 16), seed=seed, micro_batch=8) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_nearly_cold_samples_are_the_likeliest_tokens(
    model: RewardModel, questions: list[Row], shares_prefixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of such an output is the argmax of a full forward pass: image, positions and padding agree.

    Prompts and questions have several lengths, and some questions are of one image.
    """
    monkeypatch.setattr(model, "shares_prefixes", shares_prefixes)
    longer = [
        replace(row, hint=" Look closely.") for row in (questions[2], replace(questions[0], dimension=3))
    ]
    asked = [questions[0], longer[0], questions[1], longer[1], questions[2]]
    groups = sample_outputs(model, asked, Sampling(2, 12, 1e-4), 0, micro_batch=16)
    assert [replace(row, output=None) for group in groups for row in group[1:]] == asked
    rows = [row for group in groups for row in group]
    allowed = torch.ones(model.net.config.get_text_config().vocab_size, dtype=torch.bool)
    allowed[banned_ids(model.net)] = False
    for row in rows:
        batch = model.collator.batch([row])
        ids = batch.joined_ids
        with torch.no_grad():
            hidden = model.net.model(
                input_ids=ids,
                mm_token_type_ids=(ids == model.collator.encoder.image_token_id).int(),
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.grids_i3,
            ).last_hidden_state[0, batch.prefix_ids_ul.shape[1] :]
            logits = model.net.lm_head(hidden[batch.token_positions_t])
        best = logits.masked_fill(~allowed, -torch.inf).argmax(-1)
        assert best.tolist() == list(row.output or ())


def test_frequencies_are_the_models_probabilities(model: RewardModel, questions: list[Row]) -> None:
    """The first token of 400 samples against its distribution."""
    question = questions[0]
    groups = sample_outputs(model, [question], Sampling(400, 4), seed=3, micro_batch=400)
    counts = Counter(row.output[0] for row in groups[0] if row.output)
    likely = [token for token, count in counts.most_common(3) if count >= 20]
    assert likely
    rows = [Row(question.prompt, question.image, question.dimension, (token,)) for token in likely]
    probs = run_rows(model, model, rows, 8).token_log_probs_nt[:, 0].exp().tolist()
    for token, prob in zip(likely, probs, strict=True):
        assert counts[token] / 400 == pytest.approx(prob, abs=0.09)


def test_vision_tokens_are_never_sampled(model: RewardModel, questions: list[Row]) -> None:
    groups = sample_outputs(model, questions, Sampling(16, 12, 50.0), seed=0, micro_batch=48)
    sampled = {token for group in groups for row in group for token in row.output or ()}
    assert len(sampled) > 200
    assert not sampled & set(banned_ids(model.net))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 16, 1.0), "group_size"), ((2, 1, 1.0), "max_new_tokens"), ((2, 16, 0.0), "temperature")],
)
def test_unusable_settings(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(*arguments)
