"""The forward pass of training beside transformers' own, LoRA, and the checkpoint that comes out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from zreward.contract import ScoreContract
from zreward.errors import CheckpointError, ContractError, UsageError
from zreward.reference import ReferenceModel
from zreward.training.config import ModelConfig
from zreward.training.data import TrainingSet, load_training_set
from zreward.training.model import (
    RewardModel,
    banned_ids,
    check_same_contract,
    load_model,
    trainable,
)
from zreward.training.passes import run_rows
from zreward.training.save import save_checkpoint
from zreward.training.sequences import Batch, Row

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(scenes: Path, student_model: RewardModel) -> TrainingSet:
    return load_training_set(scenes, student_model.contract)


def question(data: TrainingSet, item: int, dimension: int, output: tuple[int, ...] | None = None) -> Row:
    return Row(data.items[item].prompt, data.items[item].image, dimension, output)


def whole_logits(model: RewardModel, batch: Batch) -> torch.Tensor:
    """transformers' own pass over a batch of one row, [l, vocabulary]."""
    ids = batch.joined_ids
    logits: torch.Tensor = model.net(
        input_ids=ids,
        attention_mask=batch.joined_mask,
        mm_token_type_ids=(ids == model.collator.encoder.image_token_id).int(),
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.grids_i3,
    ).logits[0]
    return logits


def mixed_rows(model: RewardModel, data: TrainingSet) -> list[Row]:
    """Rows of different lengths: direct, with a trace, with one that never ends, two of one image."""
    encoder = model.collator.encoder
    trace = (*encoder.trace_ids("red ball").tolist(), encoder.code_ids[3])
    longer = (*encoder.trace_ids("two blue cubes behind it").tolist(), encoder.code_ids[0])
    return [
        question(data, 0, 0),
        question(data, 0, 1, trace),
        question(data, 4, 2, longer),
        question(data, 5, 3, trace[:2]),
        question(data, 8, 3),
    ]


def test_direct_answers_are_the_reference(
    student_model: RewardModel, data: TrainingSet, reference_student: Path
) -> None:
    rows = [question(data, item, dimension) for item in (0, 7) for dimension in range(4)]
    got = run_rows(student_model, student_model, rows, 8).log_probs_nk.double()
    with ReferenceModel(reference_student) as reference:
        for row, log_probs in zip(rows, got, strict=True):
            temperature = student_model.contract.temperatures[row.dimension]
            expected = reference.probabilities(row.prompt, row.image)[row.dimension]
            scaled = (log_probs / temperature).softmax(-1)
            # Both in float32. Most questions are within 7e-7; one, whose score is a close call, is 2.3e-6 off.
            np.testing.assert_allclose(scaled.numpy(), expected, atol=5e-6)


def test_a_padded_batch_gives_what_its_rows_give_alone(student_model: RewardModel, data: TrainingSet) -> None:
    rows = mixed_rows(student_model, data)
    together = run_rows(student_model, student_model, rows, len(rows))
    assert together.valid_n.tolist() == [True, True, True, False, True]
    for index, row in enumerate(rows):
        alone = run_rows(student_model, student_model, [row], 1)
        n = len(row.output or ())
        assert bool(alone.valid_n[0]) == bool(together.valid_n[index])
        torch.testing.assert_close(alone.log_probs_nk[0], together.log_probs_nk[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            alone.token_log_probs_nt[0], together.token_log_probs_nt[index, :n], atol=1e-5, rtol=0
        )
        assert int(together.mask_nt[index].sum()) == n


def test_shared_prefixes_give_what_whole_sequences_give(
    reference_student: Path, student_model: RewardModel, data: TrainingSet
) -> None:
    """The same outputs and gradients, whether a prefix runs once for its rows or once in each."""
    rows = [*mixed_rows(student_model, data), *(question(data, 0, d) for d in range(4))]
    found = []
    for checkpointing in (False, True):
        config = ModelConfig(str(reference_student), gradient_checkpointing=checkpointing, train_vision=True)
        model = load_model(config, CPU).train()
        assert model.shares_prefixes != checkpointing
        out = model(model.collator.batch(rows))
        (out.bin_log_probs_ak[:, ::2].sum() + out.token_log_probs_t.sum()).backward()
        gradient = {name: p.grad for name, p in trainable(model)}
        found.append((out, gradient))
    (shared, shared_gradient), (whole, whole_gradient) = found
    torch.testing.assert_close(shared.bin_log_probs_ak, whole.bin_log_probs_ak, atol=1e-5, rtol=0)
    torch.testing.assert_close(shared.token_log_probs_t, whole.token_log_probs_t, atol=1e-5, rtol=0)
    for name, expected in whole_gradient.items():
        if expected is None:
            assert shared_gradient[name] is None
            continue
        assert (shared_gradient[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


@torch.no_grad()
def test_two_images_in_one_row(student_model: RewardModel, data: TrainingSet) -> None:
    """transformers' own positions and features for a sequence with two images, and answers of other codes."""
    first, second = question(data, 0, 1), data.items[4].image
    codes = tuple(student_model.code_ids[:2])
    row = dataclasses.replace(first, against=second, hint=" Better?", codes=codes)
    batch = student_model.collator.batch([row])
    assert int((batch.prefix_ids_ul == student_model.collator.encoder.image_token_id).sum()) == 18
    expected = whole_logits(student_model, batch)[-1, list(codes)].log_softmax(-1)
    out = run_rows(student_model, student_model, [first, first], 2)
    assert out.log_probs_nk.shape == (2, 9)
    compared = run_rows(student_model, student_model, [row, dataclasses.replace(row, dimension=0)], 2)
    assert compared.log_probs_nk.shape == (2, 2)
    torch.testing.assert_close(compared.log_probs_nk[0], expected, atol=1e-5, rtol=0)
    swapped = dataclasses.replace(row, image=second, against=first.image)
    other = run_rows(student_model, student_model, [swapped], 1).log_probs_nk[0]
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_token_log_probs_are_those_of_the_full_logits(student_model: RewardModel, data: TrainingSet) -> None:
    row = mixed_rows(student_model, data)[2]
    assert row.output is not None
    batch = student_model.collator.batch([row])
    logits = whole_logits(student_model, batch)
    log_probs = logits.log_softmax(-1)[-len(row.output) - 1 : -1]
    expected = log_probs.gather(1, torch.tensor(row.output)[:, None])[:, 0]
    torch.testing.assert_close(student_model(batch).token_log_probs_t, expected, atol=1e-5, rtol=0)
    answer = logits[-2, list(student_model.code_ids)].log_softmax(-1)
    torch.testing.assert_close(student_model(batch).bin_log_probs_ak[0], answer, atol=1e-5, rtol=0)


def test_an_image_is_encoded_once_for_all_its_rows(
    student_model: RewardModel, data: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = student_model.net.model.get_image_features

    def counted(pixels: torch.Tensor, grids: torch.Tensor, **options: object) -> object:
        seen.append(len(grids))
        return encode(pixels, grids, **options)

    monkeypatch.setattr(student_model.net.model, "get_image_features", counted)
    run_rows(student_model, student_model, [question(data, 0, d) for d in range(4)], 4)
    assert seen == [1]


def test_vision_tokens_are_banned(student_model: RewardModel) -> None:
    encoder = student_model.collator.encoder
    texts = {encoder.text_of(np.array([token])) for token in banned_ids(student_model.net)}
    assert texts == {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} - (
        set() if student_model.net.config.vision_end_token_id else {"<|vision_end|>"}
    )


class TestWhatLearns:
    def test_everything_but_the_eyes(self, reference_student: Path) -> None:
        names = [name for name, _ in trainable(load_model(ModelConfig(str(reference_student)), CPU))]
        assert names
        assert not any(".visual." in name for name in names)

    def test_everything(self, reference_student: Path) -> None:
        model = load_model(ModelConfig(str(reference_student), train_vision=True), CPU)
        assert len(list(trainable(model))) == len(list(model.parameters()))

    def test_lora(self, reference_student: Path) -> None:
        model = load_model(ModelConfig(str(reference_student), lora_rank=4), CPU)
        names = [name for name, _ in trainable(model)]
        assert all("lora_" in name for name in names)
        layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
        assert {"q_proj", "in_proj_qkv", "down_proj"} <= layers
        assert not layers & {"in_proj_a", "in_proj_b", "lm_head"}


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_saved_is_what_was_trained(
    rank: int, reference_student: Path, data: TrainingSet, tmp_path: Path
) -> None:
    config = ModelConfig(str(reference_student), lora_rank=rank)
    torch.manual_seed(0)  # the first matrices of adapters are drawn
    model = load_model(config, CPU)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter += (0.1 if rank else 0.03) * torch.randn(parameter.shape)
    weights = {name: parameter.detach() for name, parameter in trainable(model)}
    save_checkpoint(config, reference_student, weights, tmp_path / "saved")
    saved = load_model(ModelConfig(str(tmp_path / "saved")), CPU)
    assert saved.contract == model.contract
    rows = [question(data, item, 1) for item in range(6)]
    before, after = (run_rows(m, m, rows, 6).log_probs_nk.exp() for m in (model, saved))
    # bfloat16 keeps 8 bits of each weight.
    torch.testing.assert_close(after, before, atol=0.05, rtol=0)
    original = load_model(ModelConfig(str(reference_student)), CPU)
    assert (run_rows(original, original, rows, 6).log_probs_nk.exp() - before).abs().max() > 0.15


class TestContract:
    def test_another_one_is_refused(self, reference_student: Path, tmp_path: Path) -> None:
        contract = dataclasses.replace(ScoreContract.load(reference_student), instruction="Be kind.")
        contract.save(tmp_path)
        with pytest.raises(UsageError, match="another contract than the one"):
            load_model(ModelConfig(str(reference_student), contract=str(tmp_path / "contract.json")), CPU)

    def test_missing(self, reference_student: Path, tmp_path: Path) -> None:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / name).symlink_to(reference_student / name)
        with pytest.raises(ContractError, match="no score contract"):
            load_model(ModelConfig(str(tmp_path)), CPU)
        given = ModelConfig(str(tmp_path), contract=str(reference_student / "contract.json"))
        assert load_model(given, CPU).contract == ScoreContract.load(reference_student)

    def test_teacher_and_student_answer_the_same_questions(self) -> None:
        ours = ScoreContract.default()
        theirs = dataclasses.replace(ours, dimensions=ours.dimensions[:3])
        check_same_contract(ours, dataclasses.replace(ours, instruction="Other words."), "teacher")
        with pytest.raises(CheckpointError, match="teacher: its contract has the dimensions"):
            check_same_contract(ours, theirs, "teacher")
