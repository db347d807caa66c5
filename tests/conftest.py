"""Fixtures that several test files share: the command line, checkpoints and their bundles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import commands

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

ROOT = Path(__file__).resolve().parent.parent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sizes of the engines that tests built: they show that something was built."""
    engines = [
        str(value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "engine"
    ]
    if engines:
        terminalreporter.section("engines that TensorRT-RTX built")
        terminalreporter.write_line("\n".join(sorted(engines)))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from torch's second thread, and wait for it on a busy machine."""

    def limit() -> None:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)

    limit()
    yield
    limit()


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs `zreward ARGUMENTS` in a process of its own, on a terminal of 80 columns."""

    def run(
        *arguments: str | Path, cwd: Path | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        return commands.run(*arguments, cwd=cwd or ROOT, environment={"COLUMNS": "80"}, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def cuda_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of CUDA over the host's memory, see tests/support/cuda_stubs.py."""
    from tests.support.cuda_stubs import compile_cuda
    from tests.support.plugins import built_once

    return built_once(tmp_path_factory, "cuda-stubs", compile_cuda)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3.5 of the smallest test shape, with tokenizer and the default contract's questions."""
    from tests.support.models import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    """That checkpoint as an fp32 bundle, exported once per test process."""
    from zreward.export.build import ExportOptions, export_bundle

    return export_bundle(tiny_checkpoint, tiny_checkpoint.parent / "bundle", ExportOptions(parity=False)).path


@pytest.fixture(scope="session")
def reference_student() -> Path:
    """The trained checkpoint that ships with the package."""
    return ROOT / "zreward" / "assets" / "reference-student"


@pytest.fixture(scope="session")
def student_bundle(tmp_path_factory: pytest.TempPathFactory, reference_student: Path) -> Path:
    """The reference student as an fp32 bundle, exported once per test process."""
    from zreward.export.build import ExportOptions, export_bundle

    path = tmp_path_factory.mktemp("student") / "bundle"
    return export_bundle(reference_student, path, ExportOptions(parity=False)).path
