"""Commands that write a directory by `zreward.staging`, killed while they write it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_and_kill(command: Sequence[Any], output: Path, kill_after: float = math.inf) -> float:
    """Start a command and kill it some seconds after its staged directory appeared; for how long it was there.

    The time before counts for nothing: most of a short command is imports. A leftover of an earlier command of
    the same name must be gone by the end, or the assertion fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    staged = output.parent / f".{output.name}.partial-{process.pid}"
    while process.poll() is None and not staged.exists():
        time.sleep(0.001)
    begin = time.perf_counter()
    while staged.exists() and time.perf_counter() < begin + kill_after:
        time.sleep(0.001)
    seconds = time.perf_counter() - begin
    if seconds >= kill_after:
        process.kill()
    assert process.wait() == (-signal.SIGKILL if seconds >= kill_after else 0)
    own = (f".{output.name}.partial-{process.pid}", f".{output.name}.replaced-{process.pid}")
    others = [path.name for path in output.parent.iterdir() if path != output and path.name not in own]
    assert not others, "what an earlier command left is still there"
    return seconds


def is_left(output: Path) -> bool:
    """Whether a killed command left something beside `output`."""
    return any(path != output for path in output.parent.iterdir())
