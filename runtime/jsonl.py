"""Scoring a JSONL file of (prompt, image) pairs into a JSONL file of scores, line for line.

A job of a million lines will be interrupted, so the output is its own journal: it is appended in chunks
that reach the disk before the next chunk starts, and each line names the input line that it answers (its
number and a digest of its bytes) and the bundle that scored it. A second run checks what is there
against input and bundle, drops a last line that a kill tore, and goes on with the next. This costs some
sixty bytes a line and rereading the finished part, and needs no state file that could get lost.

One input line is one output line, always: a line that cannot be scored is answered with its error.
Memory is bounded by the chunk, not by the file. The output feeds `zreward eval` and whatever picks the
best image.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zreward.errors import UsageError, ZrewardError
from zreward.jsonfile import parse_json_object
from zreward.pairs import Line, LineError, Pair, pair_from_object, parse_line, read_lines

if TYPE_CHECKING:
    from zreward.runtime.scorer import Scorer

try:
    import fcntl
except ImportError:  # Windows: no lock; two writers of one output are then the caller's responsibility
    fcntl = None  # type: ignore[assignment]

CHUNK_LINES = 16
"""Lines scored together and flushed together: enough for batches, little enough to lose."""

_LINE_START = b'{"line": '

FileProgress = Callable[[int, int], None]
"""Called with the bytes of input done and in all."""


@dataclass(frozen=True)
class JsonlSummary:
    """What a run left behind.

    Attributes:
        lines: lines of the output, which is also the lines of the input.
        failed: those of them that hold an error.
        resumed: those of them that an earlier run had already written.
    """

    lines: int
    failed: int
    resumed: int


def score_jsonl(
    scorer: Scorer, source: Path, output: Path, *, restart: bool = False, progress: FileProgress | None = None
) -> JsonlSummary:
    """Score every line of `source` into `output`, going on where an earlier run stopped.

    Input lines are objects with `prompt`, `image` (a path, relative to the folder of `source`) and
    optionally `id`. Output lines carry `line`, `id` where given, `input`, `bundle`, `contract`, and
    either what `Score.to_dict` gives or `error` with `type` and `message`.

    Raises:
        UsageError: a path is unusable, another process is writing `output`, or `output` holds something
            other than the beginning of this job and `restart` is not set.
    """
    _check_paths(source, output)
    stamp = {"bundle": scorer.bundle.sha256[:16], "contract": scorer.bundle.contract.sha256}
    with source.open("rb") as stream, _exclusive(output) as sink:
        total_bytes = os.fstat(stream.fileno()).st_size
        if restart:
            sink.truncate(0)
        lines = read_lines(stream)
        resumed, failed = _skip_finished(sink, lines, stamp, output)
        count = resumed
        while chunk := list(itertools.islice(lines, CHUNK_LINES)):
            answers = _answer(scorer, chunk, source.parent)
            failed += sum("error" in answer for answer in answers)
            count += len(chunk)
            _append(sink, ({**answer, **stamp} for answer in answers))
            if progress:
                progress(chunk[-1].end, total_bytes)
    return JsonlSummary(count, failed, resumed)


def _check_paths(source: Path, output: Path) -> None:
    if not source.is_file():
        raise UsageError(f"{source}: no such input file; expected JSONL with a prompt and an image a line")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder for the output; create it first")
    if output.is_dir() or (output.exists() and output.samefile(source)):
        raise UsageError(f"{output}: the output must be a file of its own; choose another name")


@contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO]:
    """`path` opened for reading and appending, locked against a second writer until closed."""
    with path.open("a+b") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{path}: another process is writing it; wait for it or choose another output"
                ) from None
        yield file


def _skip_finished(
    sink: BinaryIO, lines: Iterator[Line], stamp: Mapping[str, str], output: Path
) -> tuple[int, int]:
    """Advance `lines` past what `sink` already answers and leave `sink` at the end of it.

    Returns the number of finished lines and how many of them are errors.
    """
    finished = failed = 0
    sink.seek(0)
    start = 0
    while text := sink.readline():
        try:
            record = parse_json_object(text.decode())
            torn = not text.endswith(b"\n")
        except (ValueError, RecursionError):
            torn = True
        if torn:
            # Only what looks like our own unfinished line is dropped, never somebody's other file.
            if sink.read(1) or text[: len(_LINE_START)] != _LINE_START[: len(text)]:
                raise _refusal(output, finished + 1, "is not a line that zreward wrote")
            break
        _check_finished(record, next(lines, None), stamp, output, finished + 1)
        finished += 1
        failed += "error" in record
        start = sink.tell()
    sink.truncate(start)
    return finished, failed


def _check_finished(
    record: Mapping[str, Any], line: Line | None, stamp: Mapping[str, str], output: Path, number: int
) -> None:
    if line is None:
        raise _refusal(output, number, "answers a line that the input does not have")
    if record.get("line") != line.number or record.get("input") != line.digest:
        raise _refusal(output, number, "answers another input line than the one that stands there now")
    if any(record.get(key) != value for key, value in stamp.items()):
        raise _refusal(output, number, "was scored with another bundle")


def _refusal(output: Path, number: int, reason: str) -> UsageError:
    return UsageError(
        f"{output}, line {number}: {reason}, so this job cannot go on from it; "
        "choose another output, or start over with --restart, which empties this one"
    )


def _answer(scorer: Scorer, chunk: Sequence[Line], folder: Path) -> list[dict[str, Any]]:
    """One record per line of `chunk`, in order."""
    answers: list[dict[str, Any]] = [{"line": line.number, "input": line.digest} for line in chunk]
    pairs: dict[int, Pair] = {}
    for index, line in enumerate(chunk):
        try:
            item = parse_line(line)
            if isinstance(item.get("id"), str | int):
                answers[index]["id"] = item["id"]
            pairs[index] = pair_from_object(item, folder)
        except LineError as error:
            answers[index].update(_error_record(error))
    results = scorer.score_pairs([(pair.prompt, pair.image) for pair in pairs.values()], errors="return")
    for index, result in zip(pairs, results, strict=True):
        record = _error_record(result) if isinstance(result, ZrewardError) else result.to_dict()
        answers[index].update(record)
    return answers


def _error_record(error: ZrewardError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _append(sink: BinaryIO, records: Iterator[dict[str, Any]]) -> None:
    """Write `records` and return once they are on the disk."""
    # ASCII escapes: an id or a path in an error message may hold lone surrogates, which UTF-8 cannot.
    sink.write(b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records))
    sink.flush()
    os.fsync(sink.fileno())
