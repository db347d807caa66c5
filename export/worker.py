"""The lowering in a process of its own.

Building graphs imports torch, which alone keeps 0.3 GB resident; in a child, that memory is gone before
the engine loads the weights for the proof. A child that is killed for memory, or crashes inside a native
library, is also an error here instead of the end of the caller. Parent and child speak JSON lines: the job
on standard input, progress, then a result or an error on standard output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import zreward
from zreward import errors
from zreward.errors import ExportError, ZrewardError
from zreward.export.job import Lowered, LoweringJob
from zreward.jsonfile import dataclass_from_json
from zreward.progress import Progress

_STDERR_LINES = 15


def lower_in_child(job: LoweringJob, report: Progress) -> Lowered:
    """Run `lower_checkpoint(job, report)` in a child process.

    Raises:
        ZrewardError: what the child raised, as the same class.
        ExportError: the child died; the message has its last words.
    """
    command = [sys.executable, "-m", "zreward.export.worker"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    last_words: list[str] = []
    listener = threading.Thread(target=lambda: last_words.extend(child.stderr or ()), daemon=True)
    listener.start()
    try:
        child.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        child.stdin.flush()  # and stays open: the child ends when its parent's side closes
        for line in child.stdout:
            message = json.loads(line)
            if "progress" in message:
                report(*message["progress"])
            elif "error" in message:
                raise _error(message["error"], message["message"])
            else:
                return dataclass_from_json(Lowered, message["result"], "lowering", ExportError)
        child.wait()
        listener.join()
        raise ExportError(_death(child.returncode, last_words))
    except BrokenPipeError:
        child.wait()
        listener.join()
        raise ExportError(_death(child.returncode, last_words)) from None
    finally:
        child.kill()
        child.wait()
        listener.join()  # a pipe must not be closed under its reader
        for pipe in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):  # closing writes what a dead child did not read
                pipe.close()


def main() -> None:
    """The child: read a job, lower it, and say what came of it."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error, not between the messages
    job = dataclass_from_json(LoweringJob, json.loads(sys.stdin.readline()), "job", ExportError)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        results.write(json.dumps(message) + "\n")
        results.flush()

    try:
        from zreward.export.lowering import lower_checkpoint

        lowered = lower_checkpoint(job, lambda *progress: say({"progress": progress}))
        say({"result": dataclasses.asdict(lowered)})
    except ZrewardError as error:
        say({"error": type(error).__name__, "message": str(error)})
    except OSError as error:
        say({"error": "ExportError", "message": f"{job.output}: cannot write the graphs ({error})"})
    except ImportError as error:
        message = f"{error.name or error} is not installed; `pip install 'zreward[export]'` brings it"
        say({"error": "ExportError", "message": message})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _environment() -> dict[str, str]:
    """The parent's environment, in which the child finds the same zreward."""
    roots = [str(Path(path).parent) for path in zreward.__path__[:1]]
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])])}


def _error(name: str, message: str) -> ZrewardError:
    cls = getattr(errors, name, ExportError)
    return cls(message) if isinstance(cls, type) and issubclass(cls, ZrewardError) else ExportError(message)


def _death(status: int, last_words: list[str]) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = "; the machine may have run out of memory" if status == -9 else ""
    tail = "".join(last_words[-_STDERR_LINES:]).strip()
    return f"the process that builds the graphs {cause}{hint}" + (f":\n{tail}" if tail else "")


if __name__ == "__main__":
    main()
