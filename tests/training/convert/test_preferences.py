"""Sets that only compare images: votes become labels, and every comparison its own pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.convert.support import (
    Job,
    encoded,
    hugging_face_image,
    write_images,
    write_json,
    write_parquet,
)
from zreward.errors import UsageError
from zreward.training.convert.hpdv2 import votes_from_rankings
from zreward.training.data import LabelledPair

AESTHETICS = 2  # its place in the default contract


class TestHpdv3:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        write_images(tmp_path, "images/a.png", "images/b.png", "images/c.png")
        pair = {"prompt": "a cat", "path1": "images/a.png", "path2": "images/b.png"}
        rows: list[dict[str, Any]] = [
            pair | {"choice_dist": [12, 4], "confidence": 0.99, "model1": "flux", "model2": "kolors"},
            pair | {"path2": "images/c.png", "choice_dist": [3, 5], "confidence": 0.5},
            pair | {"choice_dist": None, "confidence": None, "model1": "hpdv2", "model2": "hpdv2"},
            {**pair, "prompt": "a dog"},
        ]
        return write_json(tmp_path / "all.json", rows)

    def test_votes_and_preferences(self, job: Job, source: Path) -> None:
        summary = job.run("hpdv3", source, dimension="aesthetics", pairs=True)
        assert (summary.lines, summary.pairs) == (8, 4)
        lines = job.lines()
        assert lines[0] == {
            "prompt": "a cat",
            "image": "images/a.png",
            "id": "1-1",
            "scores": {"aesthetics": 4.0},  # 1 + 4 · 12/16
            "annotations": {"aesthetics": {"1": 4, "5": 12}},
        }
        assert lines[1]["id"] == "1-2" and lines[1]["scores"] == {"aesthetics": 2.0}
        # path1 is the preferred image also where the votes are written the other way around.
        assert [line["scores"]["aesthetics"] for line in lines[2:4]] == [3.5, 2.5]
        assert lines[2]["annotations"] == {"aesthetics": {"1": 3, "5": 5}}
        # Without votes there is only the preference.
        assert [line["scores"]["aesthetics"] for line in lines[4:]] == [5, 1, 5, 1]
        assert not any("annotations" in line for line in lines[4:])

    def test_training_reads_both_files(self, job: Job, source: Path) -> None:
        job.run("hpdv3", source, dimension="aesthetics", pairs=True)
        data = job.loaded()
        assert job.loaded_pairs() == [LabelledPair(2 * i, 2 * i + 1, AESTHETICS) for i in range(4)]
        np.testing.assert_array_equal(data.scores[0], [np.nan, np.nan, 4, np.nan])
        # Equal prompts are candidates of each other without the file of pairs: 15 pairs of six cats.
        assert len(data.pairs()) == 15 + 1

    @pytest.mark.parametrize("votes", [[1], [0, 0], [-1, 3], ["many", 1], [float("nan"), 1], 3])
    def test_votes_that_are_none(self, job: Job, source: Path, votes: Any) -> None:
        write_json(source, [{"prompt": "", "path1": "a", "path2": "b", "choice_dist": votes}])
        with pytest.raises(UsageError, match=r"all\.json, record 1: .*choice_dist"):
            job.run("hpdv3", source, dimension="aesthetics")


class TestHpdv2:
    def test_preferences(self, job: Job, tmp_path: Path) -> None:
        write_images(tmp_path / "train", "1.png", "2.png")
        pair = {"prompt": "a cat", "human_preference": [0, 1]}
        rows = [
            {**pair, "file_path": ["1.png", "2.png"]},
            {**pair, "image_path": ["1.png", "2.png"], "human_preference": [1, 0]},
        ]
        source = write_json(tmp_path / "train.json", rows)
        job.run("hpdv2", source, images=tmp_path / "train", dimension="aesthetics", pairs=True)
        lines = job.lines()
        assert [line["image"] for line in lines] == ["train/1.png", "train/2.png"] * 2
        assert [line["scores"]["aesthetics"] for line in lines] == [1, 5, 5, 1]
        assert not any("annotations" in line for line in lines)
        assert len(job.loaded_pairs()) == 2

    def ranking(self, **changes: Any) -> dict[str, Any]:
        """Three images, best second; one of four annotators sees the first and the third the other way around."""
        one, other = [2, 1, 3], [3, 1, 2]
        raw = [{"rank": one, "user_hash": "a"}] * 3 + [{"rank": other, "user_hash": "b"}]
        ranking = {
            "prompt": "a cat",
            "image_path": ["1.png", "2.png", "3.png"],
            "rank": one,
            "raw_annotations": raw,
        }
        return ranking | changes

    def test_rankings_are_the_votes_of_all_their_pairs(self, job: Job, tmp_path: Path) -> None:
        write_images(tmp_path, "1.png", "2.png", "3.png")
        source = write_json(tmp_path / "test.json", [self.ranking()])
        summary = job.run("hpdv2", source, dimension="aesthetics", pairs=True)
        assert (summary.lines, summary.pairs) == (3, 3)
        # Of eight votes each: the first image beats the third three times of four.
        assert [line["annotations"]["aesthetics"] for line in job.lines()] == [
            {"1": 5, "5": 3},
            {"1": 0, "5": 8},
            {"1": 7, "5": 1},
        ]
        assert [line["scores"]["aesthetics"] for line in job.lines()] == [2.5, 5.0, 1.5]
        assert [(pair["first"], pair["second"]) for pair in job.pair_lines()] == [
            ("1-1", "1-2"),
            ("1-1", "1-3"),
            ("1-2", "1-3"),
        ]
        assert len(job.loaded_pairs()) == 3

    def test_a_ranking_without_its_annotators(self, job: Job, tmp_path: Path) -> None:
        write_images(tmp_path, "1.png", "2.png", "3.png")
        row = self.ranking(rank=[1, 1, 3])
        del row["raw_annotations"]
        job.run("hpdv2", write_json(tmp_path / "test.json", [row]), dimension="aesthetics")
        assert [line["scores"]["aesthetics"] for line in job.lines()] == [4, 4, 1]  # 1.5, 1.5 and 0 of 2
        assert not any("annotations" in line for line in job.lines())

    def test_ties_are_half_a_vote(self) -> None:
        assert votes_from_rankings([[1, 1, 3]]) == ([1.5, 1.5, 0.0], [0.5, 0.5, 2.0])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rank": [1, 2]}, r"'rank' has 2 numbers for 3 images"),
            ({"raw_annotations": [{"rank": [1]}]}, r"entry 1: 'rank' has 1 numbers for 3"),
            (
                {"raw_annotations": [{"user_hash": "a"}]},
                r"entry 1: the field 'rank' is missing; found user_hash",
            ),
            ({"raw_annotations": []}, r"'raw_annotations' is empty"),
            (
                {"rank": [3, 1, 2], "raw_annotations": [{"rank": [1, 3, 2]}]},
                r"order 3 of 3 pairs against 'rank'",
            ),
            ({"image_path": ["1.png"]}, r"a comparison needs two images"),
            ({"image_path": "1.png"}, r"'image_path' must be a list; found str"),
            ({"image_path": [1, 2, 3]}, r"'image_path' must be text; found int"),
        ],
    )
    def test_malformed(self, job: Job, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        write_images(tmp_path, "1.png", "2.png", "3.png")
        source = write_json(tmp_path / "test.json", [self.ranking(), self.ranking(**changes)])
        with pytest.raises(UsageError, match=rf"record 2.*{message}"):
            job.run("hpdv2", source, dimension="aesthetics")

    def test_neither_preference_nor_rank(self, job: Job, tmp_path: Path) -> None:
        source = write_json(tmp_path / "train.json", [{"prompt": "a", "image_path": ["1", "2"]}])
        with pytest.raises(
            UsageError, match=r"'human_preference' or 'rank' is missing; found prompt, image_path"
        ):
            job.run("hpdv2", source, dimension="aesthetics")

    @pytest.mark.parametrize("preference", [[1, 1], [1], [0, 0], [0.5, 0.5]])
    def test_a_preference_names_one_image(self, job: Job, tmp_path: Path, preference: list[float]) -> None:
        row = {"prompt": "a", "image_path": ["1", "2"], "human_preference": preference}
        with pytest.raises(UsageError, match="must be 1 for one of 2 images"):
            job.run("hpdv2", write_json(tmp_path / "train.json", [row]), dimension="aesthetics")


class TestPickAPic:
    def row(self, **changes: Any) -> dict[str, Any]:
        row = {
            "are_different": True,
            "best_image_uid": "uid-a",
            "caption": "a cat",
            "has_label": True,
            "image_0_uid": "uid-a",
            "image_1_uid": "uid-b",
            "jpg_0": encoded(1, "JPEG"),
            "jpg_1": encoded(2, "WEBP"),
            "label_0": 1.0,
            "label_1": 0.0,
        }
        return row | changes

    def test_labels_and_images(self, job: Job, tmp_path: Path) -> None:
        rows = [
            self.row(),
            self.row(label_0=0.5, label_1=0.5, best_image_uid="tie", image_1_uid="uid-c", jpg_1=encoded(3)),
            self.row(has_label=False, label_0=None, label_1=None),
            self.row(image_1_uid="uid-a"),
        ]
        source = write_parquet(tmp_path / "train.parquet", rows)
        summary = job.run("pickapic-v2", source, dimension="aesthetics", pairs=True)
        assert (summary.lines, summary.pairs) == (4, 2)
        assert summary.left_out == {"has_label is false": 1, "both images are the same one": 1}
        lines = job.lines()
        assert [line["id"] for line in lines] == ["1-0", "1-1", "2-0", "2-1"]
        assert [line["image"] for line in lines] == [
            f"data-images/{name}" for name in ("uid-a.jpg", "uid-b.webp", "uid-a.jpg", "uid-c.png")
        ]
        assert [line["scores"]["aesthetics"] for line in lines] == [5, 1, 3, 3]
        assert lines[0]["annotations"] == {"aesthetics": {"1": 0, "5": 1}}
        assert lines[2]["annotations"] == {"aesthetics": {"1": 0.5, "5": 0.5}}
        assert (tmp_path / "data-images/uid-a.jpg").read_bytes() == encoded(1, "JPEG")
        assert sorted(path.name for path in (tmp_path / "data-images").iterdir()) == [
            "uid-a.jpg",
            "uid-b.webp",
            "uid-c.png",
        ]
        assert len(job.loaded_pairs()) == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label_0": 1.0, "label_1": 1.0}, r"must add up to 1; found 1 and 1"),
            ({"label_0": 2.0, "label_1": -1.0}, r"'label_0' is 2, off the set's scale from 0 to 1"),
            ({"label_0": float("nan")}, r"'label_0' is nan, which is no rating"),
            ({"label_0": None}, r"'label_0' is empty"),
            ({"image_0_uid": "../a"}, r"'\.\./a' cannot name an image file"),
            ({"image_0_uid": ""}, r"'' cannot name an image file"),
            ({"jpg_0": b"text"}, r"'jpg_0' is neither JPEG, PNG, WebP nor GIF; it starts with b'text'"),
            ({"jpg_0": b""}, r"'jpg_0' holds no image bytes"),
            ({"jpg_0": None}, r"'jpg_0' is empty"),
        ],
    )
    def test_malformed(self, job: Job, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        source = write_parquet(tmp_path / "train.parquet", [self.row(), self.row(**changes)])
        with pytest.raises(UsageError, match=rf"train\.parquet, record 2: .*{message}"):
            job.run("pickapic-v2", source, dimension="aesthetics")
        assert not job.data.exists()

    def test_an_image_that_is_there_is_never_replaced(self, job: Job, tmp_path: Path) -> None:
        source = write_parquet(tmp_path / "train.parquet", [self.row()])
        folder = tmp_path / "images"
        folder.mkdir()
        (folder / "uid-a.jpg").write_bytes(b"something else")
        with pytest.raises(UsageError, match=r"uid-a\.jpg is there and is another image"):
            job.run("pickapic-v2", source, images=folder, dimension="aesthetics")
        assert (folder / "uid-a.jpg").read_bytes() == b"something else"
        (folder / "uid-a.jpg").write_bytes(encoded(1, "JPEG"))
        job.run("pickapic-v2", source, images=folder, dimension="aesthetics")
        assert job.lines()[0]["image"] == "images/uid-a.jpg"

    def test_the_version_without_images(self, job: Job, tmp_path: Path) -> None:
        row = self.row()
        del row["jpg_0"], row["jpg_1"]
        source = write_parquet(tmp_path / "train.parquet", [row])
        with pytest.raises(
            UsageError, match=r"record 1: the field 'jpg_0' is missing; found are_different, best"
        ):
            job.run("pickapic-v2", source, dimension="aesthetics")


class TestGenAiBenchVotes:
    def row(self, vote: str, shade: int = 1) -> dict[str, Any]:
        return {
            "prompt": "a cat",
            "left_model": "SDXL",
            "left_image": hugging_face_image(shade),
            "right_model": "Kolors",
            "right_image": hugging_face_image(shade + 1),
            "vote_type": vote,
        }

    def test_votes(self, job: Job, tmp_path: Path) -> None:
        votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"]
        source = write_parquet(tmp_path / "test.parquet", [self.row(vote) for vote in votes])
        job.run("genai-bench-votes", source, dimension="realism", pairs=True)
        lines = job.lines()
        assert [line["scores"]["realism"] for line in lines] == [5, 1, 1, 5, 3, 3, 3, 3]
        assert lines[0]["id"] == "1-left" and lines[1]["id"] == "1-right"
        assert lines[0]["annotations"] == {"realism": {"1": 0, "5": 1}}
        assert len({line["image"] for line in lines}) == 2  # equal images are one file
        assert [pair["first"] for pair in job.pair_lines()] == [f"{i}-left" for i in range(1, 5)]
        assert len(job.loaded_pairs()) == 4

    def test_an_unknown_vote(self, job: Job, tmp_path: Path) -> None:
        source = write_parquet(tmp_path / "test.parquet", [self.row("upvote")])
        with pytest.raises(
            UsageError, match=r"record 1: 'vote_type' is 'upvote'; known are leftvote, rightvote"
        ):
            job.run("genai-bench-votes", source, dimension="realism")

    def test_an_image_without_bytes(self, job: Job, tmp_path: Path) -> None:
        row = self.row("leftvote") | {"left_image": {"bytes": None, "path": "a.png"}}
        source = write_parquet(tmp_path / "test.parquet", [row])
        with pytest.raises(UsageError, match="'left_image' holds no image bytes"):
            job.run("genai-bench-votes", source, dimension="realism")
