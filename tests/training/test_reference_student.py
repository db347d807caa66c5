"""A miniature run of the reference student's script, and its fast forward pass against transformers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from zreward.checkpoint import Checkpoint
from zreward.errors import CheckpointError, UsageError
from zreward.image import preprocess
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.reference import ReferenceModel
from zreward.synthetic import SceneConfig, make_scene
from zreward.synthetic.benchmark import Split
from zreward.training.reference_data import (
    MAX_DRAWN,
    NO_OBJECT,
    NO_RELATION,
    SceneArrays,
    build_arrays,
    length_batches,
)
from zreward.training.reference_distill import Distillation, Learning, distil
from zreward.training.reference_distill import main as distil_command
from zreward.training.reference_evaluate import hpa_gain, served_logits
from zreward.training.reference_forward import Answers, delta_rule, patches_from_images
from zreward.training.reference_learner import Student
from zreward.training.reference_losses import AuxiliaryHeads, soft_targets
from zreward.training.reference_model import PATCH, SPECIAL_TOKENS, THINK_TOKENS, StudentShape
from zreward.training.reference_optimize import rate_factor
from zreward.training.reference_recipe import Recipe, Stage
from zreward.training.reference_student import main, train
from zreward.training.reference_teacher import Lesson

SHAPE = StudentShape(
    hidden=64,
    heads=2,
    kv_heads=1,
    head_dim=32,
    ffn=96,
    linear_heads=2,
    linear_dim=16,
    vision_hidden=48,
    vision_layers=1,
    vision_heads=2,
    vision_ffn=64,
    image_size=48,
)
RECIPE = Recipe(
    train_prompts=30,
    train_candidates=3,
    extra_prompts=1,
    validation_prompts=12,
    test_prompts=12,
    candidates=4,
    threads=1,
    validate_minutes=10,
    vision=Stage(steps=60, minutes=5, rate=3e-3, vision_rate=3e-3, batch=24),
    language=Stage(steps=60, minutes=5, rate=3e-3, vision_rate=0.0, batch=24),
    joint=Stage(steps=20, minutes=5, rate=1e-3, vision_rate=5e-4, batch=24),
    shape=SHAPE,
    scenes=SceneConfig(size=48),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    train(RECIPE, root / "out", root / "work", "the command")
    return root


def events(run: Path, kind: str) -> list[dict[str, object]]:
    lines = (run / "out" / "training_log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_of_a_fresh_student(run: Path) -> None:
    student = Student(RECIPE)
    data = split_of(run, "1000")
    rows = np.arange(len(data))
    with torch.inference_mode():
        fresh = student.heads.vision_loss(student.features(data.images), data, rows).item()
        student.load_parts(run / "work" / "vision.safetensors")
        trained = student.heads.vision_loss(student.features(data.images), data, rows).item()
    assert trained < 0.8 * fresh


@pytest.mark.slow
def test_the_checkpoint_loads_and_its_contract_fits(run: Path) -> None:
    out = run / "out"
    checkpoint = Checkpoint.open(out)
    contract = checkpoint.contract()
    encoder = PromptEncoder(contract, load_tokenizer(out))
    assert all(info.dtype == "BF16" for info in checkpoint.tensors.values())
    assert contract.dimension_names == ("alignment", "realism", "aesthetics", "plausibility")
    assert checkpoint.config["image_token_id"] == encoder.image_token_id
    assert len(set(encoder.code_ids)) == 9
    image = make_scene(RECIPE.scenes, 9, 0, 1).candidates[0].image
    probabilities = ReferenceModel(out).probabilities("a red cube", image)
    assert probabilities.shape == (4, 9) and np.allclose(probabilities.sum(axis=1), 1.0)


@pytest.mark.slow
def test_native_scenes_pass_unresized(run: Path) -> None:
    spec = Checkpoint.open(run / "out").contract().image
    image = make_scene(RECIPE.scenes, 9, 0, 1).candidates[0].image
    patches = preprocess(image, spec)
    assert patches.grid_thw == (1, 4, 4)
    one_frame = patches.pixel_values.reshape(16, 3, 2, PATCH, PATCH)[:, :, 0].reshape(16, -1)
    ours = patches_from_images(torch.from_numpy(image)[None], spec)[0].numpy()
    assert np.allclose(one_frame, ours, atol=1e-6)


@pytest.mark.slow
def test_the_log_and_card_have_the_figures(run: Path) -> None:
    (start,), (result,) = events(run, "start"), events(run, "result")
    assert start["command"] == "the command" and "torch" in start["versions"]  # type: ignore[operator]
    assert {"test", "validation", "test_label_noise_ceiling", "temperatures"} <= set(result)
    card = (run / "out" / "README.md").read_text()
    hpa = result["test"]["overall"]["hpa"]  # type: ignore[index]
    assert f"| overall | {hpa:.4f}" in card and "the command" in card


@pytest.mark.slow
def test_finished_stages_are_not_repeated(run: Path, tmp_path: Path) -> None:
    before = (run / "out" / "model.safetensors").read_bytes()
    train(RECIPE, tmp_path / "again", run / "work")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_the_serving_form_equals_transformers_full_passes(run: Path) -> None:
    student = Student(RECIPE)
    checkpoint = Qwen3_5ForConditionalGeneration.from_pretrained(run / "out", dtype=torch.float32)
    student.model.load_state_dict(checkpoint.state_dict())
    data = split_of(run, "3000")
    served = served_logits(run / "out", data)
    with torch.inference_mode():
        for row in (0, 5):
            ids = torch.from_numpy(student.encoder.text_prefix_ids(str(data.prompts[row, 0])))[None]
            answers = student.form(ids, student.features(data.images[row : row + 1]))
            assert np.allclose(answers.logits_bqk[0].numpy(), served[row], atol=2e-4)


@pytest.fixture(scope="module")
def distilled(run: Path) -> Path:
    """The student of `run` after a miniature of the distillation."""
    plan = Distillation(
        RECIPE,
        teacher_layers=5,
        base=Stage(steps=10, minutes=5, rate=1e-3, vision_rate=0.0, batch=8),
        labelled=Split(3, 16, 2, True, "descriptions"),
        unlabelled=Split(4, 16, 2, False),
        watched=Split(5, 2, 2, True),
        answer=Lesson(steps=40, batch=8, rate=3e-3, score_weight=1.0),
        judge=Learning(steps=2, batch=2, rate=1e-4),
        group_size=2,
        distil=Learning(steps=40, batch=8, rate=1e-3),
        traces=2,
    )
    distil(plan, run / "out", run / "distilled", run / "stages", "this command")
    return run


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_of_more_layers(distilled: Path) -> None:
    log = (distilled / "distilled" / "training_log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in log]
    assert events[0]["command"] == "this command" and events[0]["recipe"]["teacher_layers"] == 5
    parameters = {e["stage"]: e["parameters"]["all"] for e in events[1:] if e["event"] == "start"}
    assert list(parameters) == ["answer", "judge", "distil"]
    assert parameters["answer"] == parameters["judge"] > parameters["distil"]
    losses = [e["loss"] for e in events if e["event"] == "step" and e["stage"] == "distil"]
    assert losses[-1] < losses[0]
    validated = {e["stage"] for e in events if e["event"] == "validation"}
    assert validated == {"base", "judge", "distil"}


@pytest.mark.slow
def test_the_distilled_student_has_the_form_of_the_first(distilled: Path) -> None:
    first, second = (load_file(distilled / name / "model.safetensors") for name in ("out", "distilled"))
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
        k: (v.shape, v.dtype) for k, v in second.items()
    }
    changed = {name for name in first if not first[name].equal(second[name])}
    assert changed and not any(".visual." in name for name in changed)
    for name in ("tokenizer.json", "config.json"):
        assert (distilled / "out" / name).read_bytes() == (distilled / "distilled" / name).read_bytes()
    result = json.loads((distilled / "distilled" / "training_log.jsonl").read_text().splitlines()[-1])
    card = (distilled / "distilled" / "README.md").read_text()
    for pattern, judged in (
        (r"\| overall \| (\S+)", "test"),
        (r"an HPA of (\S+)", "test_of_first"),
        (r"the base (\S+),", "test_of_base"),
    ):
        said = re.search(pattern, card)
        assert said and float(said[1]) == pytest.approx(result[judged]["overall"]["hpa"], abs=1e-4)
    gain = result["test_gain"]
    assert gain["hpa"] == pytest.approx(
        result["test"]["overall"]["hpa"] - result["test_of_first"]["overall"]["hpa"], abs=2e-5
    )
    assert gain["hpa_95"][0] < gain["hpa"] < gain["hpa_95"][1]
    assert (distilled / "distilled" / "first_training_log.jsonl").read_bytes() == (
        distilled / "out" / "training_log.jsonl"
    ).read_bytes()


def test_a_first_student_without_a_log_is_refused(
    reference_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    shutil.copytree(reference_student, first)
    (first / "training_log.jsonl").unlink()
    assert distil_command(["--first", str(first), "--out", str(tmp_path / "out")]) == 2
    assert "has no training_log.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused_before_training(
    reference_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, notes = tmp_path / "taken", tmp_path / "notes"
    taken.write_text("")
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    work = tmp_path / "work"
    for out, at, threads, message in (
        (taken, work, "1", "taken exists and is not a checkpoint"),
        (notes, work, "1", "notes exists and is not a checkpoint"),
        (tmp_path / "out", taken, "1", "taken is not a directory"),
        (tmp_path / "out", work, "0", "threads"),
    ):
        places = ["--first", str(reference_student), "--out", str(out), "--work", str(at)]
        assert distil_command([*places, "--threads", threads]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "taken"]
    assert (notes / "notes.txt").read_text() == "mine"


def test_a_gain_counts_the_pairs_that_are_ordered_rightly_now(run: Path) -> None:
    data = split_of(run, "2000")
    labels = data.labels[:, 0].astype(np.float64)
    same = hpa_gain(labels, labels, data)
    assert same["hpa"] == 0 and same["hpa_95"] == [0, 0]
    from_ties, from_opposite = (hpa_gain(labels, before, data)["hpa"] for before in (0 * labels, -labels))
    assert from_opposite == pytest.approx(1.0) and from_ties == pytest.approx(0.5)


def split_of(run: Path, offset: str) -> SceneArrays:
    (path,) = (run / "work").glob(f"scenes-{offset}-*.npz")
    with np.load(path) as stored:
        return SceneArrays(**stored)


def test_the_delta_rule_equals_transformers_over_two_segments() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 21, 8, generator=generator) for _ in range(3))
    decay = -torch.rand(2, 3, 21, generator=generator)
    beta = torch.rand(2, 3, 21, generator=generator)
    expected, state = torch_chunk_gated_delta_rule(
        *(x.transpose(1, 2) for x in (query, key, value)),
        g=decay.transpose(1, 2),
        beta=beta.transpose(1, 2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    parts, memory = [], None
    for piece in (slice(0, 13), slice(13, 21)):
        arguments = (tensor[:, :, piece] for tensor in (query, key, value, decay, beta))
        out, memory = delta_rule(*arguments, memory)
        parts.append(out)
    assert torch.allclose(torch.cat(parts, dim=2).transpose(1, 2), expected, atol=1e-5)
    assert memory is not None and torch.allclose(memory, state, atol=1e-5)


def test_the_tokenizer_splits_digits_and_keeps_the_markers(tmp_path: Path) -> None:
    student = Student(RECIPE)
    tokenizer = student.tokenizer
    assert tokenizer.get_vocab_size() <= 1024
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    for marker in (*SPECIAL_TOKENS, *THINK_TOKENS):
        assert len(tokenizer.encode(marker).ids) == 1
    text = "two red cubes, zwölf Käse 3.5\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer.encode(text).ids


def test_arrays_do_not_depend_on_the_number_of_workers() -> None:
    one, two = (
        build_arrays(RECIPE.scenes, 3, 110, 1, token_side=2, extra_prompts=1, workers=workers)
        for workers in (1, 2)
    )
    for field in dataclasses.fields(SceneArrays):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name


def test_token_targets_describe_the_objects() -> None:
    data = build_arrays(SceneConfig(defect_rate=0.0), 3, 20, 2, token_side=5, extra_prompts=2)
    present = data.token_rank != MAX_DRAWN
    assert present.any(axis=1).all()
    assert np.array_equal(present, data.token_base > 0)
    assert np.array_equal(present, data.matches[:, 0] > 0)
    assert data.token_rank.max() <= MAX_DRAWN < NO_OBJECT
    assert (data.counts[:, :6].sum(axis=1) == data.counts[:, 6:].sum(axis=1)).all()


def test_token_groups_and_relations_say_the_same_of_places() -> None:
    data = build_arrays(SceneConfig(defect_rate=0.0), 3, 40, 2, token_side=5, extra_prompts=2)
    assert ((data.token_group > 0) == (data.matches > 0)).all()
    compared = 0
    for image, prompt in zip(*np.nonzero(data.relations[..., 0] != NO_RELATION), strict=True):
        groups = data.token_group[image, prompt]
        first, second = (np.flatnonzero(groups == place) for place in (1, 2))
        if len(first) and len(second):
            left, right, front, behind = data.relations[image, prompt]
            rank, base = data.token_rank[image].astype(int), data.token_base[image]
            assert left == (rank[first].max() < rank[second].min())
            assert right == (rank[first].min() > rank[second].max())
            assert not front or base[first].min() > base[second].max()
            assert not behind or base[first].max() < base[second].min()
            compared += 1
    assert compared > 50


def test_the_loss_of_relations_is_lowest_where_they_are_told() -> None:
    data = build_arrays(SceneConfig(defect_rate=0.0), 3, 12, 1, token_side=2)
    rows, which = np.arange(len(data)), np.zeros(len(data), dtype=np.int64)
    held = torch.from_numpy(data.relations[:, 0].astype(np.float32))
    groups = torch.from_numpy(data.token_group[:, 0].astype(np.int64))
    heads = AuxiliaryHeads(8)
    with torch.no_grad():
        for head in (heads.group, heads.relations):
            head.weight.copy_(torch.eye(4, 8))
            head.bias.zero_()

    def loss_of(relations: torch.Tensor, tokens: torch.Tensor) -> float:
        reads = torch.nn.functional.pad(40 * relations - 20, (0, 4))[:, None]
        images = torch.nn.functional.pad(20 * torch.nn.functional.one_hot(tokens, 4).float(), (0, 4))
        return heads.relation_loss(Answers(reads, reads, images), data, rows, which, [0]).item()

    assert loss_of(held, groups) < 1e-6
    assert loss_of(1 - held, groups) > 10
    assert loss_of(held, (groups + 1) % 4) > 10
    assert loss_of(torch.where(held == NO_RELATION, 0.5, held), groups) < 1e-6


def test_batches_hold_every_row_once_and_one_length_each() -> None:
    lengths = np.array([3, 4, 3, 5, 4, 3, 3])
    batches = list(length_batches(np.random.default_rng(0), lengths, 2))
    assert sorted(np.concatenate(batches)) == list(range(7))
    assert all(len(set(lengths[rows])) == 1 and len(rows) <= 2 for rows in batches)


def test_soft_targets_are_distributions_around_the_label() -> None:
    bins = [1.0 + k / 2 for k in range(9)]
    labels = torch.tensor([[3.0, 1.0]])
    annotations = torch.tensor([[[3.0, 3.0, 3.5, 2.5, 3.0], [1.0, 1.0, 1.0, 1.0, 1.5]]])
    targets = soft_targets(labels, annotations, bins)
    assert torch.allclose(targets.sum(dim=-1), torch.ones(1, 2))
    assert targets[0, 0].argmax() == 4 and targets[0, 1].argmax() == 0
    assert torch.allclose(targets[0, 0, 3], torch.tensor(0.5 * 0.25 + 0.5 * 0.2))


def test_the_rate_warms_up_stays_and_ends_at_nothing() -> None:
    assert rate_factor(0, 0.0) == pytest.approx(0.01)
    assert rate_factor(500, 0.4) == 1.0
    assert rate_factor(500, 1.0) == pytest.approx(0.0)


def test_a_student_for_another_size_than_the_scenes_is_refused() -> None:
    with pytest.raises(UsageError, match="image_size 120"):
        Recipe(scenes=SceneConfig(size=96))


def test_an_image_is_read_as_the_runtime_reads_it() -> None:
    student = Student(RECIPE)
    picture = make_scene(RECIPE.scenes, 1, 1, 1).candidates[0].image
    patches = preprocess(Image.fromarray(picture), student.contract.image)
    with torch.inference_mode():
        expected = student.model.model.visual(
            torch.from_numpy(patches.pixel_values), torch.tensor([patches.grid_thw])
        ).pooler_output
        ours = student.features(picture[None])[0]
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    "field, value", [("threads", 0), ("test_prompts", 0), ("candidates", 1), ("seed", -1), ("image_size", 50)]
)
def test_a_recipe_that_cannot_run_is_refused(field: str, value: int) -> None:
    with pytest.raises(UsageError, match=field):
        if field == "image_size":
            shape = dataclasses.replace(SHAPE, image_size=value)
            dataclasses.replace(RECIPE, shape=shape, scenes=SceneConfig(size=value))
        else:
            dataclasses.replace(RECIPE, **{field: value})


def test_a_stage_without_time_is_refused() -> None:
    with pytest.raises(UsageError, match="minutes"):
        dataclasses.replace(RECIPE.vision, minutes=0.0)


def test_the_command_reports_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    assert main(["--out", str(file), "--work", str(tmp_path / "work")]) == 2
    assert "taken is not a directory" in capsys.readouterr().err


def test_a_stage_of_another_student_is_refused(tmp_path: Path) -> None:
    Student(RECIPE).save_parts(tmp_path / "vision.safetensors")
    wider = dataclasses.replace(RECIPE, shape=dataclasses.replace(SHAPE, hidden=96))
    with pytest.raises(CheckpointError, match="another student"):
        Student(wider).load_parts(tmp_path / "vision.safetensors")
