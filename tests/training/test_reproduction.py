"""The reproduction's order of work and its tables; its runs take hours and are not repeated here."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reproduction.__main__ import base_jobs
from benchmarks.reproduction.base import recipe_of, with_trained_tower
from benchmarks.reproduction.curves import as_svg, curves, write_curves
from benchmarks.reproduction.experiments import experiments, first_lines, jobs
from benchmarks.reproduction.orderings import answered, differences
from benchmarks.reproduction.reading import learn_to_read
from benchmarks.reproduction.report import write_report
from benchmarks.reproduction.settings import STUDENT, TEACHER, settings_for
from zreward.commands.demo import REFERENCE_STUDENT
from zreward.synthetic import DIMENSIONS
from zreward.training.reference_learner import Student
from zreward.training.reference_teacher import grown, load_weights, save_start

SETTINGS = settings_for(torch.device("cpu"))


class TestExperiments:
    def test_every_need_is_a_job(self, tmp_path: Path) -> None:
        found = jobs(SETTINGS, tmp_path, tmp_path, (0, 1))
        names = {job.name for job in found}
        assert len(names) == len(found) == 2 * len(experiments(SETTINGS))
        assert all(job.needs <= names | {"base teacher", "base student"} for job in found)

    def test_students_of_a_teacher_wait_for_it(self, tmp_path: Path) -> None:
        needs = {job.name: job.needs for job in jobs(SETTINGS, tmp_path, tmp_path, (1,))}
        assert needs["1 student-risd"] == {"base student", "1 teacher-gdso"}
        assert needs["1 student-opd"] == {"base student", "1 teacher-gdso"}
        assert needs["1 teacher-sft"] == {"base teacher"}

    def test_the_teachers_base_waits_for_the_students(self, tmp_path: Path) -> None:
        needs = {job.name: job.needs for job in base_jobs(SETTINGS, tmp_path, tmp_path)}
        assert needs == {"base student": set(), "base teacher": {"base student"}}

    def test_steps_are_those_of_the_settings(self) -> None:
        doubled = dataclasses.replace(SETTINGS, sft_steps=7, policy_steps=8, opd_steps=9, risd_steps=10)
        steps = {(row.size.name, row.name): row.steps for row in experiments(doubled)}
        assert steps["student", "sft"] == 7
        assert steps["teacher", "gdso"] == 8
        assert steps["student", "opd"] == 9
        assert steps["student", "risd"] == 10


class TestBase:
    SMALL, LARGE = (dataclasses.replace(recipe_of(size, SETTINGS), threads=1) for size in (STUDENT, TEACHER))

    @pytest.fixture(scope="class")
    def small(self) -> Student:
        """Not to be changed."""
        return with_trained_tower(self.SMALL)

    def test_a_grown_model_begins_as_the_smaller_one(self, small: Student, tmp_path: Path) -> None:
        save_start(small, tmp_path / "small")
        large = grown(self.LARGE, tmp_path / "small").model
        ids = torch.from_numpy(small.encoder.text_prefix_ids("a red ball"))[None]
        layers = large.model.language_model.layers
        assert len(layers) == 2 * len(small.model.model.language_model.layers)
        with torch.no_grad():
            torch.testing.assert_close(large(input_ids=ids).logits, small.model(input_ids=ids).logits)

    def test_weights_of_more_layers_are_refused(self, small: Student) -> None:
        fifth = {"model.language_model.layers.4.mlp.down_proj.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match="no place in a model of 4 layers"):
            load_weights(small.model, fifth)

    def test_reading_teaches_the_language_model_and_leaves_the_shipped_tower(
        self, small: Student, tmp_path: Path
    ) -> None:
        student = copy.deepcopy(small)
        learn_to_read(student, self.SMALL, 3, tmp_path, n_prompts=16)
        shipped = load_file(REFERENCE_STUDENT / "model.safetensors")
        visual = {name for name in shipped if ".visual." in name}
        assert len(visual) > 50
        before, after = small.model.state_dict(), student.model.state_dict()
        assert all(after[name].equal(shipped[name].to(after[name].dtype)) for name in visual)
        changed = {name for name, value in after.items() if not value.equal(before[name])}
        assert len(changed) > 50


def test_the_first_lines_of_a_split(tmp_path: Path) -> None:
    path = tmp_path / "scenes.jsonl"
    path.write_text("a\nb\nc\n", encoding="utf-8")
    assert first_lines(path, 3) == path
    assert first_lines(path, 2).read_text(encoding="utf-8") == "a\nb\n"
    assert first_lines(path, 2).parent == path.parent


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Two seeds of a student that is always right, one whose answers are all wrong, and one that gave no answer."""
    rng = np.random.default_rng(0)
    scores = (
        rng.permuted(np.tile([1.0, 2.0, 4.0, 5.0], (20, 4, 1)), axis=-1).transpose(0, 2, 1).reshape(80, 4)
    )
    lines = [
        {
            "prompt": f"scene {index // 4}",
            "image": f"{index}.png",
            "scores": dict(zip(DIMENSIONS, row, strict=True)),
        }
        for index, row in enumerate(scores.tolist())
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    silent = np.full_like(scores, np.nan)
    silent[0] = 3.0
    rows = {"risd": scores, "sft": -scores, "gdso": silent}
    for seed, hpa in enumerate((0.75, 0.85)):
        for name, predicted in rows.items():
            folder = tmp_path / f"seed-{seed}" / f"student-{name}"
            folder.mkdir(parents=True)
            np.save(folder / "predicted-1.npy", predicted)
            overall = {"plcc": None, "srcc": None, "hpa": hpa, "margin_hpa": 0.9}
            result = {"name": name, "size": "student", "seed": seed}
            judged = {"traces_1": {"agreement": [overall], "failed": 0.0, "tokens": 12.5}}
            (folder / "result.json").write_text(json.dumps({**result, **judged}), encoding="utf-8")
    return tmp_path


def test_the_report_has_means_over_seeds_and_their_range(judged: Path) -> None:
    text = write_report(judged, judged / "test.jsonl").read_text(encoding="utf-8")
    figures = "undefined | undefined | 0.8000 (0.750 to 0.850) | 0.9000 (0.900 to 0.900) | 12.5 | 0.0% | 2"
    assert f"| risd | {figures} |" in text
    assert "traces averaged" not in text
    assert not (judged / "curves.svg").exists()
    assert "| student-risd | student-sft | 1.0000 | 0.0000 | +100.00 (+100.00 to +100.00)" in text


def test_orderings_have_the_claims_whose_rows_are_there(judged: Path) -> None:
    found = {row.claim.worse: row for row in differences(judged, judged / "test.jsonl")}
    assert found.keys() == {"student-sft", "student-gdso"}
    assert found["student-sft"].by_seed == (1.0, 1.0)
    assert found["student-sft"].holds is True


def test_an_answer_that_failed_stands_at_the_mean_of_its_dimension(judged: Path) -> None:
    of_silent = next(r for r in differences(judged, judged / "test.jsonl") if r.claim.worse == "student-gdso")
    assert of_silent.worse == 0.5
    known = answered(np.array([[1.0, np.nan], [np.nan, np.nan], [4.0, np.nan]]))
    np.testing.assert_array_equal(known, [[1.0, 0.0], [2.5, 0.0], [4.0, 0.0]])


def test_a_difference_is_open_while_its_interval_has_0(judged: Path) -> None:
    noise = np.random.default_rng(1).random((2, 80, 4))
    np.save(judged / "seed-0" / "student-sft" / "predicted-1.npy", noise[0])
    np.save(judged / "seed-0" / "student-risd" / "predicted-1.npy", noise[1])
    (judged / "seed-1" / "student-sft" / "predicted-1.npy").unlink()
    row = next(r for r in differences(judged, judged / "test.jsonl") if r.claim.worse == "student-sft")
    assert row.holds is None
    assert len(row.by_seed) == 1
    assert row.interval.low < row.better - row.worse < row.interval.high


class TestCurves:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> Path:
        for seed, lift in enumerate((0.0, 0.0625)):
            for row, values in (("teacher-gdso", (0.75, 0.875)), ("student-risd", (0.75, 0.8125))):
                run = tmp_path / f"seed-{seed}" / row / "run"
                run.mkdir(parents=True)
                events = [{"event": "start", "step": 0}] + [
                    {"event": "validation", "step": step, "overall": {"hpa": hpa + lift}}
                    for step, hpa in zip((50, 100), values, strict=True)
                ]
                (run / "run.json").write_text('{"run": {"steps": 200}}', encoding="utf-8")
                (run / "log.jsonl").write_text(
                    "".join(json.dumps(e) + "\n" for e in events), encoding="utf-8"
                )
        return tmp_path

    def test_points_of_all_seeds_by_share_of_the_run(self, runs: Path) -> None:
        found = curves(runs)
        assert found["teacher"] == {"gdso": {0.25: [0.75, 0.8125], 0.5: [0.875, 0.9375]}}
        assert found["student"].keys() == {"risd"}

    def test_the_picture_names_every_curve(self, runs: Path) -> None:
        write_curves(runs, runs / "curves.svg")
        picture = ElementTree.parse(runs / "curves.svg")
        words = [element.text for element in picture.iter() if element.tag.endswith("text")]
        assert {"gdso", "risd", "100%", "0.74", "0.94"} <= set(words)
        circles = [element for element in picture.iter() if element.tag.endswith("circle")]
        assert len(circles) == 8

    def test_runs_that_were_not_validated_yet_have_none(self, runs: Path) -> None:
        for log in runs.glob("seed-*/*/run/log.jsonl"):
            log.write_text('{"event": "start", "step": 0}\n', encoding="utf-8")
        write_curves(runs, runs / "curves.svg")
        assert not (runs / "curves.svg").exists()

    def test_names_do_not_overlap(self) -> None:
        found = {"student": {name: {1.0: [0.8]} for name in ("sft", "grpo", "gdso", "opd", "risd")}}
        picture = ElementTree.fromstring(as_svg(found))
        names = [e for e in picture.iter() if e.text in found["student"]]
        heights = sorted(float(element.attrib["y"]) for element in names)
        assert all(after - before >= 14 for before, after in itertools.pairwise(heights))
