"""`zreward` in processes of their own that begin at once: forks of a server that has imported the large libraries.

Importing torch and transformers takes longer than most commands of the tests. What a command imports by itself, and
when, is tested with interpreters of their own: tests/runtime/test_isolation.py, tests/test_wheel.py, tests/test_cli.py.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_PRELOADED = (
    "zreward.cli",
    "zreward.export.build",
    "zreward.quant.quantize",
    "zreward.training.gdso",
    "zreward.training.risd",
    "zreward.training.sft",
    "transformers.models.qwen3_5.modeling_qwen3_5",
)
"""None of them begins a thread, which forks would not have: onnxruntime does, and is left to the commands."""


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def start(
    *arguments: str | Path,
    stdout: Path | str = os.devnull,
    stderr: Path | str = os.devnull,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Begin `zreward ARGUMENTS` with this process's environment and `environment` over it.

    The caller waits for it: `join()` and `exitcode` are those of `multiprocessing.Process`.
    """
    told = {**os.environ, **(environment or {})}
    process = _server().Process(
        target=_run, args=([*map(str, arguments)], str(stdout), str(stderr), str(cwd), told), daemon=False
    )
    process.start()
    return process


def run(
    *arguments: str | Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`zreward ARGUMENTS` to its end, with what it wrote.

    Raises:
        TimeoutExpired: it took longer than `timeout` seconds; it is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        out.touch()
        err.touch()
        process = start(*arguments, stdout=out, stderr=err, cwd=cwd, environment=environment)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["zreward", *map(str, arguments)], timeout)
        return subprocess.CompletedProcess(
            ["zreward", *map(str, arguments)],
            process.exitcode,
            out.read_text(encoding="utf-8"),
            err.read_text(encoding="utf-8"),
        )


def _run(arguments: list[str], stdout: str, stderr: str, cwd: str, environment: dict[str, str]) -> None:
    for stream, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["zreward", *arguments]
    from zreward.cli import main

    main()
