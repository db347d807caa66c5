"""Scores for an evaluation from a bundle, a checkpoint that answers, and one that reasons first."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zreward.commands.evaluate_sources import from_bundle, from_checkpoint, source_kind
from zreward.contract import ScoreContract
from zreward.errors import ContractError, UsageError
from zreward.evaluation import Floats, Labels, read_labels
from zreward.evaluation_report import Reasoning
from zreward.synthetic import SceneConfig, write_dataset

CODE = 4  # which of the nine codes the stub answers


def ignored(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with three candidates each; the labels of two dimensions are missing on some lines."""
    path = write_dataset(tmp_path_factory.mktemp("evaluate") / "scenes", SceneConfig(size=72), 5, 3, 3)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line, name in ((lines[1], "realism"), (lines[4], "alignment")):
        for labels in (line["scores"], line.get("annotations", {})):
            labels.pop(name, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def labels(scenes: Path) -> Labels:
    return read_labels(scenes)


@pytest.fixture(scope="module")
def first(labels: Labels) -> Labels:
    """The first two images alone."""
    return Labels(labels.dimensions, labels.pairs[:2], labels.digests[:2], labels.scores[:2])


def test_a_source_is_known_by_its_files(
    tmp_path: Path, student_bundle: Path, reference_student: Path
) -> None:
    assert source_kind(student_bundle) == "bundle"
    assert source_kind(reference_student) == "checkpoint"
    assert source_kind(tmp_path / "scores.jsonl") == "scores"
    with pytest.raises(UsageError, match=r"neither a bundle .* nor a checkpoint"):
        source_kind(tmp_path)


def test_a_checkpoint_scores_as_its_bundle_does(
    student_bundle: Path, reference_student: Path, labels: Labels
) -> None:
    bundle = from_bundle(student_bundle, labels, 1, ignored)
    checkpoint = from_checkpoint(reference_student, labels, None, None, ignored)
    labelled = ~np.isnan(labels.scores)
    assert bundle.predictions.probs is not None
    assert checkpoint.predictions.probs is not None
    assert np.isnan(checkpoint.predictions.means[~labelled]).all()  # only labelled questions are asked
    for one, other in (
        (bundle.predictions.probs, checkpoint.predictions.probs),
        (bundle.predictions.means, checkpoint.predictions.means),
    ):
        np.testing.assert_allclose(one[labelled], other[labelled], atol=1e-4)
    assert bundle.source.contract_sha256 == checkpoint.source.contract_sha256
    assert (bundle.source.kind, checkpoint.source.kind) == ("bundle", "checkpoint")
    assert bundle.source.bundle_sha256 is not None


def test_the_temperatures_of_the_contract_are_used(
    reference_student: Path, first: Labels, tmp_path: Path
) -> None:
    from zreward.reference import ReferenceModel

    contract = ScoreContract.load(reference_student)
    warm = replace(
        contract,
        dimensions=tuple(replace(d, temperature=0.5 + i) for i, d in enumerate(contract.dimensions)),
    )
    checkpoint = shutil.copytree(reference_student, tmp_path / "checkpoint")
    warm.save(checkpoint)
    probs = from_checkpoint(checkpoint, first, None, None, ignored).predictions.probs
    assert probs is not None
    expected = ReferenceModel(checkpoint).probabilities(first.pairs[0].prompt, first.pairs[0].image)
    order = [contract.dimension_names.index(name) for name in first.dimensions]
    np.testing.assert_allclose(probs[0], expected[order], atol=1e-5)


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_a_bad_item_fails_alone(
    kind: str,
    student_bundle: Path,
    reference_student: Path,
    labels: Labels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "no-image.png"
    text.write_text("text", encoding="utf-8")
    bad = {1: tmp_path / "missing.png", 3: text}
    pairs = tuple(replace(p, image=bad.get(i, p.image)) for i, p in enumerate(labels.pairs))
    pairs = (*pairs[:5], replace(pairs[5], prompt="word " * 5000), *pairs[6:])
    broken = dataclasses.replace(labels, pairs=pairs)

    def score(some: Labels) -> Floats:
        if kind == "bundle":
            return from_bundle(student_bundle, some, 1, ignored).predictions.means
        return from_checkpoint(reference_student, some, None, None, ignored).predictions.means

    means, whole = score(broken), score(labels)
    failed = np.isnan(means).all(axis=1)
    assert np.flatnonzero(failed).tolist() == [1, 3, 5]
    np.testing.assert_allclose(means[~failed], whole[~failed], atol=1e-5)
    told = capsys.readouterr().err
    assert all(f"item {number}: " in told for number in (2, 4, 6))


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_a_dimension_that_is_not_asked_about_is_refused_before_the_work(
    kind: str, student_bundle: Path, reference_student: Path, labels: Labels
) -> None:
    other = dataclasses.replace(labels, dimensions=("beauty", *labels.dimensions[1:]))
    with pytest.raises(UsageError, match=r"labels of 'beauty', which the contract of .* does not ask for"):
        if kind == "bundle":
            from_bundle(student_bundle, other, 1, ignored)
        else:
            from_checkpoint(reference_student, other, None, None, ignored)


def test_traces_that_end_are_averaged_and_the_others_left_out(
    reference_student: Path,
    first: Labels,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three samples of each question: two end in an answer, and one does not; of the second image none does."""
    from zreward.training import rollout
    from zreward.training.config import ModelConfig
    from zreward.training.model import load_model
    from zreward.training.passes import run_rows
    from zreward.training.sequences import Row

    calls: list[Any] = []

    def outputs(encoder: Any, row: Row) -> list[tuple[int, ...]]:
        end, code = encoder.end_of_reasoning_id, encoder.code_ids[CODE]
        words = encoder.trace_ids("good").tolist()[:-1]
        ended = (
            [(*words, end, code), (end, code)] if row.image == first.pairs[0].image else [(code,), (code,)]
        )
        return [*ended, (code, code, code)]

    def sample(
        model: Any, questions: Sequence[Row], sampling: rollout.Sampling, seed: int, micro_batch: int
    ) -> list[list[Row]]:
        calls.append((sampling, seed))
        return [[replace(row, output=o) for o in outputs(model.collator.encoder, row)] for row in questions]

    monkeypatch.setattr(rollout, "sample_outputs", sample)
    scored = from_checkpoint(reference_student, first, Reasoning(3, 64, 7), None, ignored)
    assert calls[0][0] == rollout.Sampling(3, 64)
    assert scored.source.reasoning == Reasoning(3, 64, 7, n_sampled=3 * 7, n_answered=2 * 4)

    model = load_model(ModelConfig(str(reference_student)), torch.device("cpu"))
    names = model.contract.dimension_names
    assert scored.predictions.probs is not None
    for column, name in enumerate(first.dimensions):
        row = Row(first.pairs[0].prompt, first.pairs[0].image, names.index(name))
        temperature = model.contract.temperatures[row.dimension]
        alone = [
            (run_rows(model, model, [replace(row, output=output)], 1).log_probs_nk[0] / temperature).softmax(
                -1
            )
            for output in outputs(model.collator.encoder, row)[:2]
        ]
        assert abs(alone[0] - alone[1]).max() > 1e-4  # the trace matters
        np.testing.assert_allclose(scored.predictions.probs[0, column], torch.stack(alone).mean(0), atol=1e-5)
    assert np.isnan(scored.predictions.probs[1]).all()
    assert (
        "item 2: no trace ended in an answer (alignment, aesthetics, plausibility)" in capsys.readouterr().err
    )


def test_sampling_is_real_and_seeded(
    reference_student: Path, first: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student has never seen a trace; a bias towards its end makes most samples answer."""
    from zreward.training.model import RewardModel

    plain = RewardModel.generate

    def eager(self: RewardModel, *arguments: Any, **options: Any) -> Any:
        bias = {(self.collator.encoder.end_of_reasoning_id,): 8.0}
        return plain(self, *arguments, sequence_bias=bias, **options)

    monkeypatch.setattr(RewardModel, "generate", eager)
    runs = [
        from_checkpoint(reference_student, first, Reasoning(2, 8, seed), None, ignored) for seed in (0, 0, 1)
    ]
    means = [run.predictions.means for run in runs]
    assert runs[0].source.reasoning is not None
    assert runs[0].source.reasoning.n_answered >= 7
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.array_equal(means[0], means[2], equal_nan=True)


def test_a_question_without_an_answer_gets_no_number(
    reference_student: Path, first: Labels, capsys: pytest.CaptureFixture[str]
) -> None:
    run = from_checkpoint(reference_student, first, Reasoning(1, 4, 0), None, ignored)
    assert run.source.reasoning is not None
    assert np.isfinite(run.predictions.means).sum() == run.source.reasoning.n_answered < 7
    assert "no trace ended in an answer" in capsys.readouterr().err


def test_a_contract_without_a_place_for_a_trace_is_refused_before_the_weights_are_read(
    reference_student: Path, first: Labels, tmp_path: Path
) -> None:
    contract = ScoreContract.load(reference_student)
    question = contract.template.question.replace("<think>\n\n</think>\n\n", "")
    checkpoint = shutil.copytree(reference_student, tmp_path / "checkpoint")
    replace(contract, template=replace(contract.template, question=question)).save(checkpoint)
    with pytest.raises(ContractError, match="empty think block"):
        from_checkpoint(checkpoint, first, Reasoning(1, 8, 0), None, ignored)


def test_without_the_training_packages_a_checkpoint_is_refused_in_one_line(
    reference_student: Path, scenes: Path
) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; "
        f"sys.argv = ['zreward', 'eval', {str(reference_student)!r}, {str(scenes)!r}]; "
        "from zreward.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        "a checkpoint needs the package torch; install it with `pip install 'zreward[train]'`"
        in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
