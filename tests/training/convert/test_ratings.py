"""Sets that rate images: each scale on 1 to 5, each column in its dimension."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.convert.support import (
    Job,
    hugging_face_image,
    tfrecord,
    write_images,
    write_json,
    write_parquet,
)
from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.training.convert.visionreward import CHECKLIST

NAMES = ScoreContract.default().dimension_names  # alignment, realism, aesthetics, plausibility


class TestImageRewardDb:
    def row(self, **changes: Any) -> dict[str, Any]:
        row = {
            "image_path": "images/train/train_1/a.png",
            "prompt_id": "000864-0061",
            "prompt": "a cat",
            "classification": "People",
            "image_amount_in_total": 9,
            "rank": 5,
            "overall_rating": 4,
            "image_text_alignment_rating": 3,
            "fidelity_rating": 7,
        }
        return row | changes

    @pytest.fixture(autouse=True)
    def images(self, tmp_path: Path) -> None:
        write_images(tmp_path, "images/train/train_1/a.png", "images/train/train_1/b.png")

    def source(self, tmp_path: Path, form: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"set.{form}"
        if form == "json":
            return write_json(path, rows)
        if form == "parquet":
            return write_parquet(path, rows)
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    @pytest.mark.parametrize("form", ["json", "csv", "parquet"])
    def test_ratings(self, job: Job, tmp_path: Path, form: str) -> None:
        rows = [
            self.row(),
            self.row(
                image_path="images/train/train_1/b.png", image_text_alignment_rating=1, fidelity_rating=2
            ),
        ]
        job.run("imagerewarddb", self.source(tmp_path, form, rows))
        assert job.lines()[0] == {
            "prompt": "a cat",
            "image": "images/train/train_1/a.png",
            "id": "1",
            "scores": {"alignment": pytest.approx(1 + 4 * 2 / 6, abs=1e-6), "plausibility": 5.0},
        }
        data = job.loaded()
        np.testing.assert_allclose(data.scores[1], [1, np.nan, np.nan, 1 + 4 / 6], atol=1e-6)
        assert len(data.pairs()) == 2  # two candidates of one prompt in two dimensions

    def test_the_overall_rating_takes_a_name(self, job: Job, tmp_path: Path) -> None:
        job.run("imagerewarddb", self.source(tmp_path, "json", [self.row()]), dimension="overall")
        assert job.lines()[0]["scores"]["overall"] == 3.0
        with pytest.raises(UsageError, match="'alignment' is what the set's image_text_alignment_rating is"):
            job.run(
                "imagerewarddb",
                self.source(tmp_path, "json", [self.row()]),
                dimension="alignment",
                replace=True,
            )

    def test_a_folder_of_json_lists(self, job: Job, tmp_path: Path) -> None:
        folder = tmp_path / "images" / "train"
        write_json(folder / "train_1" / "train_1.json", [self.row()])
        (folder / "train_2").mkdir()
        write_json(folder / "train_2" / "train_2.json", [self.row(image_path="images/train/train_1/b.png")])
        job.run("imagerewarddb", folder, images=tmp_path)
        assert [(line["id"], line["image"][-5:]) for line in job.lines()] == [("1", "a.png"), ("2", "b.png")]

    @pytest.mark.parametrize("form", ["json", "csv"])
    @pytest.mark.parametrize(
        ("rating", "message"),
        [
            (0, r"'fidelity_rating' is 0, off the set's scale from 1 to 7"),
            (8, r"'fidelity_rating' is 8, off the set's scale from 1 to 7"),
            (float("nan"), r"'fidelity_rating' is nan, which is no rating"),
            ("good", r"'fidelity_rating' must be a number; found 'good'"),
            (None, r"the field 'fidelity_rating' is empty"),
        ],
    )
    def test_off_the_scale(self, job: Job, tmp_path: Path, form: str, rating: Any, message: str) -> None:
        source = self.source(tmp_path, form, [self.row(), self.row(fidelity_rating=rating)])
        with pytest.raises(UsageError, match=rf"set\.{form}, record 2: {message}"):
            job.run("imagerewarddb", source)


class TestRichHf:
    def example(self, **changes: Any) -> dict[str, Any]:
        example = {
            "filename": "train/uid-a.png",
            "aesthetics_score": 2 / 3,
            "artifact_score": 7 / 12,
            "misalignment_score": 1.0,
            "overall_score": 0.5,
            "artifact_map": b"\xff\xd8\xff\xe0",
            "misalignment_map": b"\xff\xd8\xff\xe0",
            "prompt_misalignment_label": "1 1 0",
        }
        return example | changes

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        write_images(tmp_path / "images", "uid-a.jpg", "train/uid-b.png")
        path = tmp_path / "train.tfrecord"
        path.write_bytes(
            tfrecord(self.example(), self.example(filename="train/uid-b.png", artifact_score=0.0))
        )
        return path

    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Path:
        return write_json(tmp_path / "prompts.json", {"train/uid-a.png": "a cat", "uid-b": "a dog"})

    def test_scores(self, job: Job, source: Path, prompts: Path, tmp_path: Path) -> None:
        job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)
        # (mean − 1) / 4 of three ratings: 2/3 is 11/3, 7/12 is 10/3.
        assert job.lines()[0] == {
            "prompt": "a cat",
            "image": "images/uid-a.jpg",
            "id": "1",
            "scores": {"alignment": 5.0, "aesthetics": 3.666667, "plausibility": 3.333333},
        }
        assert job.lines()[1]["image"] == "images/train/uid-b.png"
        np.testing.assert_allclose(job.loaded().scores[1], [5, np.nan, 11 / 3, 1], atol=1e-6)

    def test_the_overall_score_takes_a_name(
        self, job: Job, source: Path, prompts: Path, tmp_path: Path
    ) -> None:
        job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts, dimension="realism")
        assert job.lines()[0]["scores"]["realism"] == 3.0

    def test_prompts_from_pick_a_pic(self, job: Job, source: Path, tmp_path: Path) -> None:
        rows = [{"caption": "a cat", "image_0_uid": "uid-b", "image_1_uid": "uid-a", "has_label": True}]
        prompts = write_parquet(tmp_path / "pickapic.parquet", rows)
        job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)
        assert [line["prompt"] for line in job.lines()] == ["a cat", "a cat"]

    def test_prompts_line_by_line(self, job: Job, source: Path, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(
            '{"filename": "train/uid-a.png", "prompt": "one"}\n\n{"filename": "uid-b.png", "prompt": "two"}\n'
        )
        job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)
        assert [line["prompt"] for line in job.lines()] == ["one", "two"]

    def test_prompts_in_the_set(self, job: Job, source: Path, tmp_path: Path) -> None:
        source.write_bytes(tfrecord(self.example(prompt="a bird")))
        job.run("richhf-18k", source, images=tmp_path / "images")
        assert job.lines()[0]["prompt"] == "a bird"

    def test_no_prompts(self, job: Job, source: Path, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match=r"train\.tfrecord, record 1: there is no prompt in it; give .*--prompts"
        ):
            job.run("richhf-18k", source, images=tmp_path / "images")

    def test_missing_prompts_and_images(self, job: Job, source: Path, tmp_path: Path) -> None:
        prompts = write_json(tmp_path / "prompts.json", {"uid-b": "a dog"})
        (tmp_path / "images/train/uid-b.png").unlink()
        with pytest.raises(
            UsageError, match=r"2 images or prompts are missing, the first is the prompt of train/uid-a"
        ):
            job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)
        write_json(prompts, {"uid-a": "a cat"})
        summary = job.run(
            "richhf-18k", source, images=tmp_path / "images", prompts=prompts, skip_missing=True
        )
        assert (summary.lines, summary.n_missing) == (1, 1)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"artifact_score": 1.5}, r"'artifact_score' is 1.5, off the set's scale from 0 to 1"),
            ({"artifact_score": float("nan")}, r"'artifact_score' is nan"),
            ({"artifact_score": "high"}, r"'artifact_score' must be a number; found 'high'"),
            ({"filename": b"\xff"}, r"'filename' is not UTF-8"),
        ],
    )
    def test_malformed(
        self, job: Job, source: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        source.write_bytes(tfrecord(self.example(), self.example(**changes)))
        with pytest.raises(UsageError, match=rf"train\.tfrecord, record 2: {message}"):
            job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)

    def test_a_missing_feature(self, job: Job, source: Path, prompts: Path, tmp_path: Path) -> None:
        example = self.example()
        del example["artifact_score"]
        source.write_bytes(tfrecord(example))
        message = (
            r"record 1: the field 'artifact_score' is missing; found aesthetics_score, artifact_map, filename"
        )
        with pytest.raises(UsageError, match=message):
            job.run("richhf-18k", source, images=tmp_path / "images", prompts=prompts)


class TestVisionReward:
    def annotation(self, **changes: Any) -> dict[str, Any]:
        """Everything at its best; nobody in the image."""
        grades: dict[str, Any] = {
            name: item.highest for items in CHECKLIST.values() for name, item in items.items()
        }
        nobody = {"body": -4, "hands": -4, "face": -3}
        return grades | {"safety": 1, "emotion": 2, "unsafe type": 0} | nobody | changes

    def run(self, job: Job, tmp_path: Path, *annotations: dict[str, Any]) -> list[dict[str, Any]]:
        rows = [
            {
                "image": hugging_face_image(shade),
                "internal_id": str(shade),
                "prompt": "a cat",
                "url": "",
                "annotation": annotation,
                "meta_result": [1, 0],
                "meta_mask": [1, 1],
            }
            for shade, annotation in enumerate(annotations)
        ]
        job.run("visionreward-image", write_parquet(tmp_path / "train.parquet", rows), replace=True)
        return job.lines()

    def test_the_checklist_names_the_published_items(self) -> None:
        known = set(self.annotation())
        assert len(known) == 18
        assert set(CHECKLIST) <= set(NAMES)

    def test_grades(self, job: Job, tmp_path: Path) -> None:
        lines = self.run(
            job,
            tmp_path,
            self.annotation(),
            self.annotation(clarity=0, body=-1, hands=1, face=-2),
            self.annotation(face=2, symmetry=-1, **{"lighting aesthetic": -1}),
        )
        assert lines[0]["scores"] == {"aesthetics": 5.0, "realism": 5.0}
        assert lines[1]["scores"]["realism"] == pytest.approx((3 + 5 + 5) / 3, abs=1e-6)
        assert lines[1]["scores"]["plausibility"] == pytest.approx((3 + 5 + 1) / 3, abs=1e-6)
        # No light in it, so eight items of composition, colour and light, one of them at its worst.
        assert lines[2]["scores"]["aesthetics"] == pytest.approx((1 + 7 * 5) / 8, abs=1e-6)
        assert lines[2]["scores"]["plausibility"] == 5.0  # a beautiful face is a face without errors
        data = job.loaded()
        assert np.isnan(data.scores[:, NAMES.index("alignment")]).all()
        assert len(data.pairs()) == 3 + 3 + 1

    def test_every_range_ends_at_1_and_5(self, job: Job, tmp_path: Path) -> None:
        worst = {name: item.worst for items in CHECKLIST.values() for name, item in items.items()}
        best = {name: item.best for items in CHECKLIST.values() for name, item in items.items()}
        lines = self.run(job, tmp_path, self.annotation(**worst), self.annotation(**best))
        assert [set(line["scores"].values()) for line in lines] == [{1.0}, {5.0}]

    def test_an_item_that_is_not_filled_in(self, job: Job, tmp_path: Path) -> None:
        lines = self.run(job, tmp_path, self.annotation(clarity=None), self.annotation())
        assert lines[0]["scores"]["realism"] == 5.0

    @pytest.mark.parametrize(
        ("item", "grade", "message"),
        [
            ("clarity", 3, r"'clarity' is 3, off the set's scale from -2 to 2"),
            ("body", -5, r"'body' is -5, off the set's scale from -4 to 1"),
        ],
    )
    def test_off_the_scale(self, job: Job, tmp_path: Path, item: str, grade: int, message: str) -> None:
        with pytest.raises(UsageError, match=rf"record 2, annotation: {message}"):
            self.run(job, tmp_path, self.annotation(), self.annotation(**{item: grade}))

    def test_a_missing_item(self, job: Job, tmp_path: Path) -> None:
        annotation = self.annotation()
        del annotation["symmetry"]
        with pytest.raises(
            UsageError, match=r"annotation: the field 'symmetry' is missing; found object pairing"
        ):
            self.run(job, tmp_path, annotation)


class TestGenAiBenchRatings:
    def test_ratings(self, job: Job, tmp_path: Path) -> None:
        write_images(tmp_path, "DALLE_3/00000.jpeg", "SDXL_Base/00000.jpeg", "DALLE_3/00001.jpeg")
        prompts = {
            "00000": {
                "id": "00000",
                "prompt": "a cat",
                "models": {"DALLE_3": [5, 4, 5], "SDXL_Base": [1, 3, 5]},
            },
            "00001": {"prompt": "a dog", "models": {"DALLE_3": [2, 2, 1]}},
        }
        job.run("genai-bench-ratings", write_json(tmp_path / "genai_image.json", prompts))
        assert job.lines()[1] == {
            "prompt": "a cat",
            "image": "SDXL_Base/00000.jpeg",
            "id": "1-SDXL_Base",
            "annotations": {"alignment": [1.0, 3.0, 5.0]},
        }
        data = job.loaded()
        np.testing.assert_allclose(data.scores[:, 0], [5, 3, 2])  # the middle of three
        assert len(data.pairs()) == 1

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], r"expected a JSON object of prompts"),
            ({}, r"expected a JSON object of prompts"),
            ({"0": []}, r"record 1 \(0\): expected an object; found list"),
            ({"0": {"prompt": "a"}}, r"record 1 \(0\): the field 'models' is missing; found prompt"),
            ({"0": {"prompt": "a", "models": [1]}}, r"'models' must be an object; found list"),
            (
                {"0": {"prompt": "a", "models": {"M": [6]}}},
                r"models: 'M' is 6, off the set's scale from 1 to 5",
            ),
            ({"0": {"prompt": "a", "models": {"M": []}}}, r"models: 'M' has no ratings"),
            ({"0": {"prompt": "a", "models": {"M": [None]}}}, r"'M' must be a number; found None"),
        ],
    )
    def test_malformed(self, job: Job, tmp_path: Path, prompts: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            job.run("genai-bench-ratings", write_json(tmp_path / "genai_image.json", prompts))


class TestEvalMuse:
    def row(self, **changes: Any) -> dict[str, Any]:
        row = {
            "prompt_id": "1",
            "prompt": "a cat",
            "type": "real",
            "img_path": "SDXL-Turbo/1.png",
            "total_score": [4, 5, 4, 1, 4, 5],
            "element_score": {"cat (animal)": [1, 1, 0]},
            "promt_meaningless": [0, 0, 0],
            "split_confidence": [1, 1, 1],
            "attribute_confidence": [1, 1, 1],
            "fidelity_label": [],
        }
        return row | changes

    def test_ratings(self, job: Job, tmp_path: Path) -> None:
        write_images(tmp_path / "images", "SDXL-Turbo/1.png")
        source = write_json(tmp_path / "train_list.json", [self.row()])
        job.run("evalmuse-40k", source, images=tmp_path / "images")
        assert job.lines() == [
            {
                "prompt": "a cat",
                "image": "images/SDXL-Turbo/1.png",
                "id": "1",
                "annotations": {"alignment": [4.0, 5.0, 4.0, 1.0, 4.0, 5.0]},
            }
        ]
        assert job.loaded().scores[0, 0] == (4 + 4 + 4 + 5) / 4

    @pytest.mark.parametrize(
        ("score", "message"),
        [
            ([4, 6], r"'total_score' is 6, off the set's scale from 1 to 5"),
            ([4, True], r"'total_score' must be a number; found True"),
            ([], r"'total_score' has no ratings"),
            (4.2, r"'total_score' must be a list; found float"),
        ],
    )
    def test_malformed(self, job: Job, tmp_path: Path, score: Any, message: str) -> None:
        source = write_json(tmp_path / "train_list.json", [self.row(), self.row(total_score=score)])
        with pytest.raises(UsageError, match=rf"train_list\.json, record 2: {message}"):
            job.run("evalmuse-40k", source)
