"""The JSONL form of pairs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zreward.errors import UsageError
from zreward.pairs import (
    MAX_LINE_BYTES,
    LineError,
    pair_from_object,
    parse_line,
    read_labelled_pairs,
    read_lines,
)

LABELLED = {"prompt": "a cat", "image": "cat.png", "scores": {"realism": 3.5}}


@given(st.lists(st.binary(max_size=30).map(lambda text: text.replace(b"\n", b"").replace(b"\r", b""))))
def test_lines_are_those_of_the_file(lines: list[bytes]) -> None:
    stream = io.BytesIO(b"".join(line + b"\n" for line in lines))
    read = list(read_lines(stream))
    assert [line.text for line in read] == [line + b"\n" for line in lines]
    assert [line.number for line in read] == list(range(1, len(lines) + 1))


def test_digest_does_not_depend_on_the_line_break() -> None:
    digests = {next(read_lines(io.BytesIO(b"{}" + end))).digest for end in (b"", b"\n", b"\r\n")}
    assert len(digests) == 1


def test_an_endless_line_is_passed_over_without_being_kept() -> None:
    stream = io.BytesIO(b"x" * (3 * MAX_LINE_BYTES) + b"\n{}\n")
    first, second = read_lines(stream)
    assert first.text is None
    assert second.text == b"{}\n"
    assert second.end == len(stream.getvalue())
    with pytest.raises(LineError, match="longer than"):
        parse_line(first)


def test_image_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    assert pair_from_object(LABELLED, tmp_path).image == tmp_path / "cat.png"
    absolute = pair_from_object({**LABELLED, "image": "/images/cat.png"}, tmp_path)
    assert absolute.image == Path("/images/cat.png")


@pytest.mark.parametrize("scores", [{}, None, {"realism": float("inf")}, {"realism": True}, [3.5]])
def test_a_data_set_needs_scores_on_every_line(tmp_path: Path, scores: object) -> None:
    path = tmp_path / "data.jsonl"
    broken = {**LABELLED, "scores": scores}
    path.write_text(f"{json.dumps(LABELLED)}\n{json.dumps(broken)}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"data\.jsonl, line 2"):
        list(read_labelled_pairs(path))
