"""zreward.jsonfile: what is read strictly, and files that are whole at every moment."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward import jsonfile
from zreward.errors import ContractError, ZrewardError
from zreward.jsonfile import dataclass_from_json, parse_json_object, read_json_object, write_json, write_text

text = st.text()
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(text, v), max_leaves=20)


@dataclass(frozen=True)
class Inner:
    count: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    pair: tuple[float, float]
    axes: tuple[int | str, ...] = ()
    flag: bool = False
    parts: Mapping[str, Inner] = field(default_factory=dict)
    anything: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ContractError("name is empty")


WHOLE = {
    "name": "a",
    "inner": {"count": 3, "ratio": 2},
    "pair": [1, 2.5],
    "axes": ["batch", 4],
    "flag": True,
    "parts": {"x": {"count": 1}},
    "anything": {"free": [None, 1]},
}


@given(st.dictionaries(text, values))
@settings(max_examples=60, deadline=None)
def test_what_json_writes_is_read_back(value: dict[str, Any]) -> None:
    assert parse_json_object(json.dumps(value)) == value
    assert parse_json_object(json.dumps(value, ensure_ascii=False)) == value


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "Expecting value"),
        ('{"a": 1', "Expecting"),
        ('{"a": 1} {"b": 2}', "Extra data"),
        ("[1]", "found list"),
        ("null", "found NoneType"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ('{"a": ' + "[" * 100_000, "nested"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
    ],
)
def test_what_is_not_strict_json_is_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json_object(source)


def test_a_repeated_key_among_many_is_found_at_once() -> None:
    keys = ", ".join(f'"{i}": 0' for i in range(200_000))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="twice"):
        parse_json_object("{" + keys + ', "199999": 0}')
    assert time.perf_counter() - start < 5.0


def test_every_way_a_file_fails_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.json"
    with pytest.raises(ContractError, match=r"some\.json: cannot be read"):
        read_json_object(path, ContractError)
    with pytest.raises(ContractError, match="cannot be read"):
        read_json_object(tmp_path, ContractError)
    for content in (
        b"",
        b"{",
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 1}',
        b'{"a": "\\ud800"}',
        b'{"\\udc00": 1}',
    ):
        path.write_bytes(content)
        with pytest.raises(ContractError, match=r"some\.json: not valid JSON"):
            read_json_object(path, ContractError)
    monkeypatch.setattr(jsonfile, "MAX_JSON_BYTES", 10)
    path.write_text('{"a": "' + "x" * 20 + '"}')
    with pytest.raises(ContractError, match="too large"):
        read_json_object(path, ContractError)


def test_a_whole_object_becomes_the_dataclass() -> None:
    got = dataclass_from_json(Outer, WHOLE, "here", ContractError)
    assert got == Outer(
        "a", Inner(3, 2.0), (1.0, 2.5), ("batch", 4), True, {"x": Inner(1)}, {"free": [None, 1]}
    )
    assert isinstance(got.inner.ratio, float)
    again = dataclass_from_json(Outer, json.loads(json.dumps(dataclasses.asdict(got))), "here", ContractError)
    assert again == got


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "here: name: expected a string, found 5"),
        ({"name": None}, "name: expected a string"),
        ({"name": ""}, "name is empty"),
        ({"inner": [1]}, "inner: expected an object, found list"),
        ({"inner": {}}, "inner: field 'count' is missing"),
        ({"inner": {"count": 1, "cuont": 2}}, "unknown field 'cuont'; known are count, ratio"),
        ({"inner": {"count": True}}, "count: expected an integer, found True"),
        ({"inner": {"count": 1.0}}, "count: expected an integer"),
        ({"inner": {"count": 1, "ratio": True}}, "ratio: expected a number"),
        ({"inner": {"count": 1, "ratio": 10**400}}, "ratio: the number is too large"),
        ({"pair": [1]}, "pair: expected 2 values, found 1"),
        ({"pair": "ab"}, "pair: expected a list, found str"),
        ({"pair": [1, "b"]}, r"pair\[1\]: expected a number"),
        ({"axes": [True]}, r"axes\[0\]"),
        ({"axes": [1.5]}, r"axes\[0\]"),
        ({"flag": 1}, "flag: expected true or false"),
        ({"parts": [1]}, "parts: expected an object"),
        ({"parts": {"x": {"count": "1"}}}, "x: count: expected an integer"),
        ({"anything": [1]}, "anything: expected an object"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_each_mistake_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        dataclass_from_json(Outer, {**WHOLE, **change}, "here", ContractError)


def test_what_is_not_an_object_is_refused() -> None:
    for data in (None, [], "text", 1):
        with pytest.raises(ZrewardError, match="expected an object"):
            dataclass_from_json(Outer, data, "here", ZrewardError)


@given(value=st.dictionaries(text, values))
@settings(max_examples=25, deadline=None)
def test_written_files_are_read_back(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, value)
    assert read_json_object(path, ContractError) == value


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.json"
    write_json(path, {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}, {"a": "\ud800"}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="space"):
        write_json(path, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["some.json"]
    assert read_json_object(path, ContractError) == {"a": 1}


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "some.txt", "ä\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "some.txt").stat().st_mode) == 0o640
    assert (tmp_path / "some.txt").read_bytes() == "ä\n".encode()
