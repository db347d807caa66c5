"""From a set to a data file, and to a file of pairs where the set compares images.

Both files are written beside their final names and renamed once everything went well. Missing images and prompts are
counted to the end before the job is refused, so that one run says how much is missing.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from zreward.errors import UsageError
from zreward.training.convert.formats import FORMATS
from zreward.training.convert.records import Item, LeftOut, Missing, Outcome, Record, Request


@dataclass(frozen=True)
class Target:
    """What is written.

    Attributes:
        data: JSONL file of the data set.
        pairs: JSONL file of the set's comparisons, for preference sets.
        replace: whether files of these names are replaced.
    """

    data: Path
    pairs: Path | None = None
    replace: bool = False


@dataclass
class Summary:
    """What became of a set.

    Attributes:
        lines, pairs: how many were written.
        left_out: records without a label of their own, by reason.
        n_missing: images and prompts that were not there.
        first_missing: the first of them.
    """

    lines: int = 0
    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    n_missing: int = 0
    first_missing: str = ""

    def miss(self, what: str) -> None:
        """Count something that is not there."""
        self.n_missing += 1
        self.first_missing = self.first_missing or what


def images_folder(name: str, source: Path, data: Path) -> Path:
    """Where the images of a set are looked for, or are written to, unless the caller says otherwise."""
    if FORMATS[name].writes_images:
        return data.parent / f"{data.stem}-images"
    return source if source.is_dir() else source.parent


def convert_dataset(
    name: str, request: Request, target: Target, *, limit: int | None = None, skip_missing: bool = False
) -> Summary:
    """Convert the set `name` (a key of `FORMATS`).

    Args:
        limit: read only so many records.
        skip_missing: leave out what has no image or no prompt, instead of refusing the set.

    Raises:
        UsageError: the set, an option or a file is not usable; nothing but images has been written then.
    """
    _check_request(name, request, target)
    paths = [target.data] if target.pairs is None else [target.data, target.pairs]
    with _staged_files(paths) as (lines, *pair_lines):
        sink = _Sink(request, target, FORMATS[name].preference, lines, *pair_lines)
        outcomes = itertools.islice(FORMATS[name].convert(request), limit)
        for number, outcome in enumerate(outcomes, 1):
            sink.add(number, outcome)
        _check_result(request, sink.summary, skip_missing)
    return sink.summary


class _Sink:
    """Turns outcomes into lines and counts them."""

    def __init__(
        self,
        request: Request,
        target: Target,
        compares: bool,
        lines: TextIO,
        pair_lines: TextIO | None = None,
    ) -> None:
        self.summary = Summary()
        self._request = request
        self._folder = target.data.parent.absolute()
        self._compares = compares
        self._lines = lines
        self._pair_lines = pair_lines

    def add(self, number: int, outcome: Outcome) -> None:
        """Write what became of record `number`."""
        if isinstance(outcome, LeftOut):
            self.summary.left_out[outcome.reason] += 1
        elif isinstance(outcome, Missing):
            self.summary.miss(outcome.what)
        elif not outcome.prompt.strip():
            self.summary.left_out["the prompt is empty"] += 1
        else:
            self._add_record(number, outcome)

    def _add_record(self, number: int, record: Record) -> None:
        items = [item for item in record.items if self._is_there(item.image)]
        if self._compares and len(items) < 2:
            return
        ids = [f"{number}-{item.side}" if item.side else str(number) for item in items]
        for id_, item in zip(ids, items, strict=True):
            self._write(self._lines, self._line(id_, record.prompt, item))
            self.summary.lines += 1
        if self._pair_lines is not None:
            for first, second in itertools.combinations(ids, 2):
                pair = {"first": first, "second": second, "dimension": self._request.voted}
                self._write(self._pair_lines, pair)
                self.summary.pairs += 1

    def _line(self, id_: str, prompt: str, item: Item) -> dict[str, Any]:
        line = {"prompt": prompt, "image": self._image(item.image), "id": id_}
        labels = {"scores": dict(item.scores), "annotations": dict(item.annotations)}
        return line | {key: values for key, values in labels.items() if values}

    def _image(self, path: Path) -> str:
        """Relative to the folder of the file if the image lies in it or below, else absolute."""
        absolute = path.absolute()
        if absolute.is_relative_to(self._folder):
            return absolute.relative_to(self._folder).as_posix()
        return str(absolute)

    def _is_there(self, image: Path) -> bool:
        try:
            there = image.is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            self.summary.miss(str(image))
        return there

    @staticmethod
    def _write(stream: TextIO, value: Any) -> None:
        stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _check_request(name: str, request: Request, target: Target) -> None:
    format_ = FORMATS[name]
    if format_.preference and not request.dimension:
        raise UsageError(
            f"{name} only says which image was preferred, not in what; name the dimension that it shall label with "
            "--dimension, such as --dimension aesthetics"
        )
    if request.dimension and not (format_.preference or format_.overall):
        raise UsageError(f"{name} rates known dimensions and nothing else; leave out --dimension")
    if target.pairs is not None and not format_.preference:
        raise UsageError(
            f"{name} rates each image, so its pairs are those of equal prompts; leave out --pairs"
        )
    if request.prompts is not None and not format_.reads_prompts:
        raise UsageError(f"{name} has prompts of its own; leave out --prompts")
    if not request.source.exists():
        raise UsageError(f"{request.source}: no such file or folder")
    if not format_.writes_images and not request.images.is_dir():
        raise UsageError(f"{request.images}: no such folder of images")
    _check_output(target.data, target.replace, request)
    if target.pairs is not None:
        _check_output(target.pairs, target.replace, request)
        if target.pairs.resolve() == target.data.resolve():
            raise UsageError(f"{target.data}: the data and the pairs need two files")


def _check_output(path: Path, replace: bool, request: Request) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file itself")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder to write {path.name} in")
    if not path.exists():
        return
    for source in (request.source, request.prompts):
        if source is not None and source.exists() and path.samefile(source):
            raise UsageError(f"{path} is what is read; choose another name")
    if not replace:
        raise UsageError(f"{path} exists; choose another name, or replace it with --force")


def _check_result(request: Request, summary: Summary, skip_missing: bool) -> None:
    if summary.n_missing and not skip_missing:
        raise UsageError(
            f"{summary.n_missing:,} images or prompts are missing, the first is {summary.first_missing}; is "
            f"{request.images} the folder that image paths start from (--images)? --skip-missing leaves them out"
        )
    if not summary.lines:
        reasons = [f"{count:,} × {reason}" for reason, count in summary.left_out.items()]
        if summary.n_missing:
            reasons.append(f"{summary.n_missing:,} missing, the first is {summary.first_missing}")
        raise UsageError(f"{request.source}: nothing is left to write ({'; '.join(reasons) or 'no records'})")


@contextmanager
def _staged_files(paths: Sequence[Path]) -> Iterator[Sequence[TextIO]]:
    """Files that appear under their names together, after all of them are on the disk."""
    temporaries = [path.with_name(f".{path.name}.{secrets.token_hex(8)}") for path in paths]
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(path.open("x", encoding="utf-8", newline="\n")) for path in temporaries
            ]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
