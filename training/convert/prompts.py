"""Prompts by image name, for RichHF-18K, whose files hold none.

Users of that set look its images up in Pick-a-Pic by the uid that is their file name, and take the caption of the row
(github.com/google-research-datasets/richhf-18k, issue 7). So a file of prompts may be parquet of Pick-a-Pic itself, of
the version without images too, besides JSON and JSON Lines. Names are compared without folder and ending.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from zreward.errors import UsageError
from zreward.training.convert.records import Row
from zreward.training.convert.sources import files_of_source, read_json, rows_from_source

_PARQUET_COLUMNS = ("caption", "image_0_uid", "image_1_uid")


def image_key(name: str) -> str:
    """`uid` of `train/uid.png`."""
    return PurePosixPath(name).stem


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts by `image_key`, the first one where a name comes twice.

    Args:
        path: a JSON object of prompts by file name; JSON Lines with `filename` and `prompt`; or parquet files with
            `caption`, `image_0_uid` and `image_1_uid`, or a folder of them.

    Raises:
        UsageError: there is no such file, or it has another form.
    """
    prompts: dict[str, str] = {}
    for name, prompt in _entries(path):
        prompts.setdefault(image_key(name), prompt)
    return prompts


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix.lower() == ".json":
        files_of_source(path, ".json")
        values = read_json(path)
        if not isinstance(values, dict) or not values:
            raise UsageError(f"{path}: expected a JSON object of prompts by file name")
        row = Row(str(path), values)
        yield from ((name, row.text(name)) for name in values)
    elif path.suffix.lower() == ".jsonl":
        yield from ((row.text("filename"), row.text("prompt")) for row in rows_from_source(path, ".jsonl"))
    else:
        for row in rows_from_source(path, ".parquet", columns=_PARQUET_COLUMNS):
            caption = row.text("caption")
            yield row.text("image_0_uid"), caption
            yield row.text("image_1_uid"), caption
