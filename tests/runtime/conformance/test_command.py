"""`zreward conformance` as a user meets it: tables, the file, exit statuses, and what a wrong call says."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import Cli
from tests.support.bundles import accept_changes, change_golden
from tests.support.conformance import LIMITS, SCHEMA
from zreward import cli as command_line
from zreward.bundle import Bundle
from zreward.commands.conformance import _builder
from zreward.runtime.conformance import run, shapes, timing

QUICK = ("--cycles", "2", "--repetitions", "1", "--threads", "1")


@pytest.fixture
def status_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `zreward conformance ARGUMENTS` in this process and in an empty folder; its exit status."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def run_command(*arguments: str | Path) -> int:
        monkeypatch.setattr("sys.argv", ["zreward", "conformance", *map(str, arguments)])
        try:
            command_line.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run_command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes, and a device that nobody measures."""
    every = shapes.shapes_of
    monkeypatch.setattr(shapes, "shapes_of", lambda *given: every(*given)[-2:])
    monkeypatch.setattr(run, "limits_of_cpu", lambda *_: LIMITS)
    monkeypatch.setattr(timing, "WARM_UP", 0)


def test_the_provider_cpu_conforms(cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    result = cli("conformance", "--provider", "cpu", tiny_bundle, *QUICK, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stdout.count("PASS \n") == 14 and "FAIL" not in result.stdout
    assert "left out: plugins among the engine's layers: the provider cpu is examined" in result.stdout
    assert "PASS: cpu conforms; 14 checks passed, 1 left out" in result.stdout
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("conformance-cpu-20") and f"written: {file.name}" in result.stderr
    data = json.loads(file.read_text("utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    assert data["passed"] and data["bundle"]["sha256"] == Bundle.open(tiny_bundle).sha256
    assert data["limits"]["products"]["float32"]["source"].startswith("measured: ")


@pytest.mark.usefixtures("quick")
def test_a_check_that_fails(status_of: Any, bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(bundle_copy)
    change_golden(bundle, 0.01)
    accept_changes(bundle)
    assert status_of(bundle_copy, "--provider", "cpu", *QUICK, "-o", "report.json") == 1
    shown = capsys.readouterr().out
    assert "golden scores, a bin probability         1.0e-02  2.0e-03      FAIL" in shown
    assert "FAIL: golden scores, a bin probability: more than is allowed" in shown
    assert "FAIL: 1 of 14 checks failed, 1 left out" in shown
    data = json.loads(Path("report.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    assert not data["passed"]


@pytest.mark.usefixtures("quick")
def test_a_report_is_written_whole_or_not_at_all(
    status_of: Any, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("report.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = (tiny_bundle, "--provider", "cpu", *QUICK, "-o", "report.json", "--force")
    with monkeypatch.context() as patch:
        patch.setattr("zreward.jsonfile.os.fsync", full)
        assert status_of(*arguments) == 1
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err and "PASS: cpu conforms" in captured.out
    assert [path.name for path in Path().iterdir()] == ["report.json"]
    assert Path("report.json").read_text() == "{}", "the earlier report stays"


def test_engines_are_built_as_zreward_engine_builds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from zreward.export import tensorrt

    library = tmp_path / "plugins.so"
    library.touch()
    built: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tensorrt, "build_engine", lambda *arguments: built.append(arguments))
    build = _builder(tmp_path, "tensorrt", print)
    build(None, False)
    build(library, True)
    plain, replacing = (
        tensorrt.EngineOptions(),
        tensorrt.EngineOptions(plugins=library, force=True),
    )
    assert built == [(tmp_path, plain, print), (tmp_path, replacing, print)]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["BUNDLE"], 2, "Missing option '--provider'"),
        (["--provider", "cpu"], 2, "Missing argument"),
        (["BUNDLE", "--provider", "auto"], 2, "name the one to examine: cpu"),
        (["BUNDLE", "--provider", "cpu", "--cycles", "1"], 2, "greater than or equal to 2"),
        (
            ["BUNDLE", "--provider", "cpu", "--build"],
            2,
            "the provider cpu runs no engine of a bundle; leave --build out",
        ),
        (["BUNDLE", "--provider", "cuda", "--gpu", "plugins=p"], 2, "cuda takes only device, memory"),
        (["BUNDLE", "--provider", "tensorrt", "--gpu", "plugins=p", "--no-plugins"], 2, "contradict"),
        (["BUNDLE", "--provider", "cpu", "--gpu", "device=1"], 2, "uses no GPU; leave --gpu out"),
        (["BUNDLE", "--provider", "cpu", "-o", "none/a.json"], 2, "no such folder for --output"),
        (["BUNDLE", "--provider", "cpu", "-o", ".."], 2, "is a folder; --output takes the name of a file"),
        (["BUNDLE", "--provider", "cpu", "-o", "closed/a.json"], 2, "nothing can be written here"),
        (["BUNDLE", "--provider", "cpu", "-o", "../there.json"], 2, "replace it with --force"),
        (["nowhere", "--provider", "cpu"], 1, "not a bundle"),
        (["BUNDLE", "--provider", "tensorrt"], 1, "exported for cpu, which the provider tensorrt cannot run"),
        (["BUNDLE", "--provider", "tensorrt-rtx", "--build"], 1, "exported for cpu, which the provider"),
        (["BUNDLE", "--provider", "cuda"], 1, "exported for cpu, which the provider cuda cannot run"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_writes_nothing(
    status_of: Any,
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    Path("../there.json").write_text("{}")
    if "closed/a.json" in arguments:
        Path("closed").mkdir()
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path).name != "closed" and access(path, mode)
        )
    assert status_of(*[str(tiny_bundle) if a == "BUNDLE" else a for a in arguments]) == status
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split()), captured.err
    assert captured.out == "" and "Traceback" not in captured.err
    assert [path.name for path in Path().rglob("*.json")] == []
    assert Path("../there.json").read_text() == "{}"
