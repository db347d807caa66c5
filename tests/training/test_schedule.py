"""Jobs of the reproduction that wait for one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reproduction.schedule import Job, run_jobs


def note(path: Path, name: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(name + "\n")


def fail(path: Path, name: str) -> None:
    raise RuntimeError(f"{name} failed, and {path} has no line of it")


class TestRunJobs:
    def test_a_job_waits_for_what_it_needs(self, tmp_path: Path) -> None:
        done = tmp_path / "done"
        made = [
            Job("last", note, (done, "last")).after(["middle"]),
            Job("middle", note, (done, "middle")).after(["first", "of no job"]),
            Job("first", note, (done, "first")),
        ]
        run_jobs(made, workers=2)
        assert done.read_text(encoding="utf-8").split() == ["first", "middle", "last"]

    def test_a_failure_is_raised_and_nothing_after_it_begins(self, tmp_path: Path) -> None:
        done = tmp_path / "done"
        made = [Job("a", fail, (done, "a")), Job("b", note, (done, "b")).after(["a"])]
        with pytest.raises(RuntimeError, match="a failed"):
            run_jobs(made, workers=1)
        assert not done.exists()

    def test_a_circle_is_refused(self, tmp_path: Path) -> None:
        made = [Job("a", note, (tmp_path, "a")).after(["b"]), Job("b", note, (tmp_path, "b")).after(["a"])]
        with pytest.raises(ValueError, match="wait for one another: a, b"):
            run_jobs(made, workers=1)
