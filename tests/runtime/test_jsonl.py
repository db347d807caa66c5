"""Scoring a JSONL file: one answer a line, errors as answers, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken_inputs import EXPECTED_ERRORS, N_LINES, write_job
from tests.support.fake_scorer import FakeScorer
from zreward.errors import UsageError
from zreward.pairs import MAX_LINE_BYTES
from zreward.runtime.jsonl import CHUNK_LINES, JsonlSummary, score_jsonl

ROOT = Path(__file__).parent.parent.parent
DRIVER = [sys.executable, "-m", "tests.support.fake_scorer"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def whole_run(job: Path) -> bytes:
    """The output of a run that nothing disturbed."""
    output = job.parent / "undisturbed.jsonl"
    score(job, output)
    return output.read_bytes()


def score(source: Path, output: Path, scorer: FakeScorer | None = None, **options: Any) -> JsonlSummary:
    return score_jsonl(scorer or FakeScorer(), source, output, **options)  # type: ignore[arg-type]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_ten_broken_lines_of_a_thousand(job: Path, tmp_path: Path) -> None:
    scorer = FakeScorer()
    summary = score(job, tmp_path / "scores.jsonl", scorer)
    answers = records(tmp_path / "scores.jsonl")
    assert summary == JsonlSummary(lines=N_LINES, failed=len(EXPECTED_ERRORS), resumed=0)
    assert [answer["line"] for answer in answers] == list(range(1, N_LINES + 1))
    errors = {answer["line"]: answer["error"] for answer in answers if "error" in answer}
    assert {line: error["type"] for line, error in errors.items()} == EXPECTED_ERRORS
    assert all(error["message"] for error in errors.values())
    scored = [answer for answer in answers if "error" not in answer]
    assert len(scored) == 990
    assert all(set(answer["dimensions"]) == set(scorer.contract.dimension_names) for answer in scored)
    assert all(answer["contract"] == scorer.contract.sha256 for answer in answers)
    assert scorer.largest_chunk <= CHUNK_LINES


def test_ids_are_handed_through_also_with_an_error(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path, '{"prompt": "p", "image": "no.png", "id": "a"}', '{"prompt": 3, "image": "no.png", "id": 7}'
    )
    score(source, tmp_path / "scores.jsonl")
    assert [answer["id"] for answer in records(tmp_path / "scores.jsonl")] == ["a", 7]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a JSON object"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"prompt": "p"}', "'image' is missing"),
        ('{"prompt": "p", "image": 3}', "'image' must be a string"),
        ('{"prompt": "p", "image": "x", "image": "y"}', "twice"),
        ('{"prompt": "p", "image": "x", "id": 1.5}', "'id' must be"),
        ('{"prompt": "p", "image": "x", "scores": {"realism": "good"}}', "'scores' must be"),
        ('{"prompt": "' + "p" * MAX_LINE_BYTES + '", "image": "x"}', "longer than"),
        ('{"prompt": "p", "image": "\\ud800.png"}', "image"),
        ('{"prompt": "p", "image": "a\\u0000b.png"}', "image"),
    ],
)
def test_a_malformed_line_is_one_error_and_the_next_line_is_scored(
    job: Path, tmp_path: Path, line: str, message: str
) -> None:
    good = json.dumps({"prompt": "p", "image": str(job.parent / "3.png")})
    summary = score(write_lines(tmp_path, line, good), tmp_path / "scores.jsonl")
    first, second = records(tmp_path / "scores.jsonl")
    assert summary.failed == 1
    assert message in first["error"]["message"]
    assert second["line"] == 2
    assert "overall" in second


def test_bytes_that_are_not_utf8_are_an_error(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b'{"prompt": "\xff", "image": "x"}\n')
    assert score(source, tmp_path / "scores.jsonl").failed == 1


@pytest.mark.parametrize("cut", [1, 5, 200])
def test_a_torn_last_line_is_scored_again(job: Path, whole_run: bytes, tmp_path: Path, cut: int) -> None:
    output = tmp_path / "scores.jsonl"
    lines = whole_run.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:400]) + lines[400][:cut])
    summary = score(job, output)
    assert summary.resumed == 400
    assert output.read_bytes() == whole_run


def test_a_finished_job_is_left_as_it_is(job: Path, whole_run: bytes, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    output.write_bytes(whole_run)
    summary = score(job, output)
    assert summary == JsonlSummary(lines=N_LINES, failed=10, resumed=N_LINES)
    assert output.read_bytes() == whole_run


def test_lines_that_were_added_to_the_input_are_scored(job: Path, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "p", "image": str(job.parent / "3.png")})
    source, output = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    source.write_text(line, encoding="utf-8")  # the last line break is still missing
    score(source, output)
    source.write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert score(source, output) == JsonlSummary(lines=2, failed=0, resumed=1)


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost(job: Path, whole_run: bytes, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    for wanted in (100, 300, 600):
        process = subprocess.Popen([*DRIVER, str(job), str(output), "0.02"], cwd=ROOT)
        wait_for_lines(output, wanted, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert output.read_bytes() != whole_run, "it was killed too late to prove anything"
    summary = score(job, output)
    assert summary.resumed >= 600
    assert output.read_bytes() == whole_run


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def test_another_bundle_is_refused_and_restart_starts_over(
    job: Path, whole_run: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "scores.jsonl"
    output.write_bytes(b"".join(whole_run.splitlines(keepends=True)[:10]))
    other = FakeScorer(bundle_sha256="cd" * 32)
    with pytest.raises(UsageError, match=r"line 1: was scored with another bundle.*--restart"):
        score(job, output, other)
    assert score(job, output, other, restart=True).resumed == 0


def test_another_input_is_refused(job: Path, whole_run: bytes, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    output.write_bytes(whole_run)
    lines = job.read_text(encoding="utf-8").splitlines()
    lines[4] = lines[4].replace("scene", "another scene")
    with pytest.raises(UsageError, match="line 5: answers another input line"):
        score(write_lines(tmp_path, *lines), output)
    with pytest.raises(UsageError, match="line 4: answers a line that the input does not have"):
        score(write_lines(tmp_path, *lines[:3]), output)
    assert output.read_bytes() == whole_run


@pytest.mark.parametrize(
    "content", ["my notes", "my notes\nof today\n", '{"line": 1}\n{"line": 2}\n', "\0\0\0"]
)
def test_a_file_that_is_something_else_is_not_touched(job: Path, tmp_path: Path, content: str) -> None:
    output = tmp_path / "notes.txt"
    output.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="cannot go on"):
        score(job, output)
    assert output.read_text(encoding="utf-8") == content


def test_unusable_paths_are_usage_errors(job: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such input"):
        score(tmp_path / "none.jsonl", tmp_path / "scores.jsonl")
    with pytest.raises(UsageError, match="no such folder"):
        score(job, tmp_path / "none" / "scores.jsonl")
    with pytest.raises(UsageError, match="file of its own"):
        score(job, job)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_second_writer_is_refused(job: Path, tmp_path: Path) -> None:
    import fcntl

    output = tmp_path / "scores.jsonl"
    with output.open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            score(job, output)
