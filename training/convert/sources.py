"""The files of a source as rows: JSON lists, JSON Lines, CSV and parquet.

JSON Lines, CSV and parquet are read piece by piece; a JSON list is loaded whole, which its format asks for. pyarrow is
imported only where a parquet file is read, so that the other sets need nothing but Python.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zreward.errors import UsageError
from zreward.pairs import LineError, parse_line, read_lines
from zreward.training.convert.records import Row

_BATCH_ROWS = 64
"""Parquet rows held at once; some sets have images of a megabyte in each."""

_LFS_POINTER = b"version https://git-lfs"


def rows_from_source(source: Path, *suffixes: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file, or of all files in a folder and below it whose names end with one of `suffixes`.

    Args:
        columns: what is read of a parquet file; those that it lacks are missing in its rows.

    Raises:
        UsageError: there is no such file, it is not of such a format, it is damaged, or it has no rows.
    """
    for path in files_of_source(source, *suffixes):
        count = 0
        for row in _READERS[path.suffix.lower()](path, columns):
            count += 1
            yield row
        if not count:
            raise UsageError(f"{path}: there is nothing in it")


def files_of_source(source: Path, *suffixes: str) -> list[Path]:
    """The file, or all files in the folder and below it whose names end with one of `suffixes`, in order.

    Raises:
        UsageError: there are none, or one has another ending, is empty or is a pointer of Git LFS.
    """
    expected = " or ".join(suffixes)
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise UsageError(f"{source}: no {expected} file in this folder")
    elif not source.is_file():
        raise UsageError(f"{source}: no such file")
    else:
        paths = [source]
    for path in paths:
        if path.suffix.lower() not in suffixes:
            raise UsageError(f"{path}: expected a {expected} file")
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if not start:
            raise UsageError(f"{path}: the file is empty")
        if start == _LFS_POINTER:
            raise UsageError(f"{path}: a pointer of Git LFS, not the data; run `git lfs pull` in its folder")
    return paths


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UsageError: the file is truncated or otherwise no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON, or cut short ({error})") from None


def _json_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    values = read_json(path)
    if not isinstance(values, list):
        raise UsageError(f"{path}: expected a JSON list of objects; found {type(values).__name__}")
    for number, value in enumerate(values, 1):
        where = f"{path}, record {number}"
        if not isinstance(value, dict):
            raise UsageError(f"{where}: expected an object; found {type(value).__name__}")
        yield Row(where, value)


def _jsonl_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    with path.open("rb") as stream:
        for line in read_lines(stream):
            where = f"{path}, record {line.number}"
            if line.text is not None and not line.text.strip():
                continue
            try:
                yield Row(where, parse_line(line))
            except LineError as error:
                raise UsageError(f"{where}: {error}") from None


def _csv_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for number, values in enumerate(csv.DictReader(stream, strict=True), 1):
                where = f"{path}, record {number}"
                if None in values:
                    raise UsageError(f"{where}: more cells than the first line has names")
                yield Row(where, {name: value or None for name, value in values.items()})
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid CSV in UTF-8, or cut short ({error})") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path}: parquet files need pyarrow: pip install 'zreward[train]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            present = [name for name in columns if name in found]
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=present):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, record {number}", values, tuple(found))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a parquet file, or a damaged or cut one ({reason})") from None


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
