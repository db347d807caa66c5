"""Files that cannot be read are named, with the record and the field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.convert.support import encoded, write_json, write_parquet
from zreward.errors import UsageError
from zreward.training.convert.prompts import read_prompts
from zreward.training.convert.records import Row, Scale
from zreward.training.convert.sources import rows_from_source


def read(path: Path, *suffixes: str, columns: tuple[str, ...] = ("a", "b")) -> list[dict[str, Any]]:
    found = suffixes or (".json", ".jsonl", ".csv", ".parquet")
    return [dict(row.values) for row in rows_from_source(path, *found, columns=columns)]


def test_rows_of_each_form(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "ü"}, {"a": 3, "b": "z"}]
    (tmp_path / "rows.jsonl").write_text(
        '{"a": 1, "b": "x"}\n\n{"a": 2, "b": "ü"}\n{"a": 3, "b": "z"}', "utf-8"
    )
    (tmp_path / "rows.csv").write_text("\ufeffa,b\n1,x\n2,ü\n3,z\n", "utf-8")
    write_json(tmp_path / "rows.json", rows)
    write_parquet(tmp_path / "rows.parquet", [row | {"c": 0} for row in rows])
    for form in ("json", "jsonl", "parquet"):
        assert read(tmp_path / f"rows.{form}") == rows, form
    assert read(tmp_path / "rows.csv") == [{"a": str(row["a"]), "b": row["b"]} for row in rows]


def test_a_folder_is_read_in_order_and_below(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write_parquet(tmp_path / "train-00001.parquet", [{"a": 3}])
    write_parquet(tmp_path / "train-00000.parquet", [{"a": 1}, {"a": 2}])
    write_parquet(tmp_path / "below" / "x.parquet", [{"a": 0}])
    (tmp_path / "README.md").write_text("no parquet")
    assert [row["a"] for row in read(tmp_path, ".parquet")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", r"a\.json: the file is empty"),
        ("a.json", b"[]", r"a\.json: there is nothing in it"),
        ("a.json", b'[{"a": 1}, {"a"', r"a\.json: not valid JSON, or cut short \(.*line 1"),
        ("a.json", b"[" * 100_000, r"a\.json: not valid JSON"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: not valid JSON"),
        ("a.json", b'{"a": 1}', r"a\.json: expected a JSON list of objects; found dict"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, record 2: expected an object; found int"),
        ("a.jsonl", b"\n\n", r"a\.jsonl: there is nothing in it"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl, record 2: not a JSON object"),
        ("a.jsonl", b'{"a": NaN}', r"a\.jsonl, record 1: .*NaN"),
        ("a.csv", b"a,b\n", r"a\.csv: there is nothing in it"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, record 1: more cells than the first line has names"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv: not valid CSV in UTF-8, or cut short \(unexpected end of data"),
        ("a.csv", b"a,b\n\xff,2\n", r"a\.csv: not valid CSV in UTF-8"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a parquet file, or a damaged or cut one"),
        ("a.txt", b"a", r"a\.txt: expected a \.json or \.jsonl or \.csv or \.parquet file"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            r"a\.parquet: a pointer of Git LFS, not the data; run `git lfs pull`",
        ),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json: no such file"):
        read(tmp_path / "none.json")
    with pytest.raises(UsageError, match=r"no \.parquet file in this folder"):
        read(tmp_path, ".parquet")


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"a": encoded(shade)} for shade in range(20)])
    whole = path.read_bytes()
    for end in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError, match="not a parquet file, or a damaged or cut one"):
            read(path)


def test_damaged_parquet_pages(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"a": f"text {number}"} for number in range(200)], 100)
    whole = bytearray(path.read_bytes())
    whole[4:60] = b"\xff" * 56
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="not a parquet file, or a damaged or cut one"):
        read(path)


def test_a_row_says_what_is_wrong_with_a_field() -> None:
    row = Row("a.json, record 3", {"text": "x", "n": 3, "half": "\ud83d", "nothing": None, "huge": 10**400})
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: row["score"], r"a\.json, record 3: the field 'score' is missing; found text, n, half"),
        (lambda: row["nothing"], r"the field 'nothing' is empty"),
        (lambda: row.text("n"), r"'n' must be text; found int"),
        (lambda: row.text("half"), r"'half' holds half of a surrogate pair"),
        (lambda: row.number("text"), r"'text' must be a number; found 'x'"),
        (lambda: row.number("huge"), r"'huge' must be a number"),
        (lambda: row.label("n", Scale(0, 1)), r"'n' is 3, off the set's scale from 0 to 1"),
        (lambda: row.row("n"), r"'n' must be an object; found int"),
        (lambda: row.image_bytes("text"), r"'text' holds no image bytes"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()
    assert "score" not in row and "nothing" not in row and "n" in row


def test_scales_are_linear() -> None:
    assert [Scale(1, 7).label(rating) for rating in (1, 4, 7)] == [1, 3, 5]
    assert [Scale(-3, 1).label(rating) for rating in (-3, -1, 1)] == [1, 3, 5]


class TestPrompts:
    def test_the_first_of_a_name_stays(self, tmp_path: Path) -> None:
        path = write_json(
            tmp_path / "prompts.json", {"train/a.png": "one", "test/a.jpg": "two", "b": "three"}
        )
        assert read_prompts(path) == {"a": "one", "b": "three"}

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("p.json", [], r"expected a JSON object of prompts by file name"),
            ("p.json", {"a": 1}, r"p\.json: 'a' must be text; found int"),
            ("p.jsonl", {"name": "a"}, r"record 1: the field 'filename' is missing; found name"),
            ("p.txt", {}, r"p\.txt: expected a \.parquet file"),
        ],
    )
    def test_malformed(self, tmp_path: Path, name: str, value: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            read_prompts(write_json(tmp_path / name, value))
        with pytest.raises(UsageError, match="no such file"):
            read_prompts(tmp_path / "none.json")
