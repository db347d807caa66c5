"""Commands that write a directory by `zreward.staging`, killed while they write it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support import commands


def run_and_kill(arguments: Sequence[str | Path], output: Path, kill_after: float = math.inf) -> float:
    """Start `zreward ARGUMENTS` and kill it some seconds after its staged directory appeared.

    A leftover of an earlier command of the same name must be gone by the end, or the assertion fails.

    Returns:
        For how many seconds the directory was there.
    """
    process = commands.start(*arguments)
    staged = output.parent / f".{output.name}.partial-{process.pid}"
    while process.exitcode is None and not staged.exists():
        time.sleep(0.001)
    begin = time.perf_counter()
    while staged.exists() and time.perf_counter() < begin + kill_after:
        time.sleep(0.001)
    seconds = time.perf_counter() - begin
    if seconds >= kill_after:
        process.kill()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if seconds >= kill_after else 0)
    own = (f".{output.name}.partial-{process.pid}", f".{output.name}.replaced-{process.pid}")
    others = [path.name for path in output.parent.iterdir() if path != output and path.name not in own]
    assert not others, "what an earlier command left is still there"
    return seconds


def is_left(output: Path) -> bool:
    """Whether a killed command left something beside `output`."""
    return any(path != output for path in output.parent.iterdir())
