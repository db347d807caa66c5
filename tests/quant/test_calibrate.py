"""Calibration files are checked whole before anything long begins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zreward.errors import QuantizationError
from zreward.prompt import PromptEncoder
from zreward.quant.calibrate import Item, batches, items_from_file, scene_items


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_gives_its_items(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    path = write(tmp_path / "data.jsonl", {"prompt": "red", "image": "a.png", "scores": {"realism": 3.5}})
    (item,) = items_from_file(path)
    assert (item.prompt, item.image, item.scores) == ("red", tmp_path / "a.png", {"realism": 3.5})


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [{"prompt": "x", "image": name} for name in ("a.png", "b.png", "c.png")]
    with pytest.raises(
        QuantizationError, match=r"2 of 3 images do not exist: line 2: .*b\.png; line 3: .*c\.png"
    ):
        items_from_file(write(tmp_path / "data.jsonl", *lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no items"),
        ("not json\n", "line 1: not a JSON object"),
        ('{"prompt": "x"}\n', "line 1: the key 'image' is missing"),
        ('{"prompt": 7, "image": "a.png"}\n', "line 1: 'prompt' must be a string"),
        ('{"prompt": "x", "image": "a.png", "scores": {"realism": NaN}}\n', "line 1"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(QuantizationError, match=message):
        items_from_file(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="no such file"):
        items_from_file(tmp_path / "nowhere.jsonl")


def test_scenes_are_those_of_their_seed() -> None:
    first, again, other = (scene_items(seed, 2, 2) for seed in (5, 5, 6))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [a.prompt for a in first] != [b.prompt for b in other]


def test_batches_hold_every_question_once(encoder: PromptEncoder, items: list[Item]) -> None:
    asked = [
        (int(index), int(dimension))
        for batch in batches(items, encoder.contract, encoder, all_questions=True)
        for index, dimension in zip(batch.indices, batch.dimensions, strict=True)
    ]
    assert sorted(asked) == [(i, d) for i in range(len(items)) for d in range(4)]


def test_sequences_are_the_encoders(encoder: PromptEncoder, items: list[Item]) -> None:
    (batch,) = batches(items, encoder.contract, encoder)
    for row, index in enumerate(batch.indices):
        n_tokens = int((batch.ids[row, : batch.lengths[row]] == encoder.image_token_id).sum())
        expected = encoder.sequence_ids(items[index].prompt, n_tokens, int(batch.dimensions[row]))
        assert np.array_equal(batch.ids[row, : batch.lengths[row]], expected)
