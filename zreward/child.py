"""Work in a process of its own, whose memory is gone when it ends and whose death is an error of the caller.

A child that is killed for memory, or crashes inside a native library, is an error message here instead of the end of
the caller. Parent and child speak JSON lines: the job on standard input, messages on standard output. The child ends
when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zreward
from zreward import errors
from zreward.errors import ZrewardError

Message = dict[str, Any]

_STDERR_LINES = 15


@contextmanager
def child_process(
    module: str, job: Mapping[str, Any], *, what: str, error: type[ZrewardError]
) -> Iterator[Iterator[Message]]:
    """Run `python -m module`, which calls `serve`, and hear its messages; leaving the block ends it.

    Args:
        what: what the child does, for the message about its death: "the process that …".
        error: raised where the child dies, or raises what this process does not know.

    Raises:
        ZrewardError: what the child raised, as the same class, while its messages are read.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module],
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

    def messages() -> Iterator[Message]:
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            if "error" in message:
                raise _error(message["error"], message["message"], error)
            yield message
        child.wait()
        listener.join()
        if child.returncode:
            raise error(_death(what, child.returncode, last_words))

    try:
        # A child that is dead already says so when its messages are read.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()  # and stays open: the child ends when its parent's side closes
        yield messages()
    finally:
        child.kill()
        child.wait()
        listener.join()  # a pipe must not be closed under its reader
        for pipe in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):  # closing writes what a dead child did not read
                pipe.close()


def serve(work: Callable[[Message, Callable[[Message], None]], None]) -> None:
    """The child: read a job and hand it to `work`, with a function that sends a message.

    A `ZrewardError` of `work` is raised in the parent.
    """
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error, not between the messages
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(message: Message) -> None:
        results.write(json.dumps(message) + "\n")
        results.flush()

    try:
        work(job, say)
    except ZrewardError as error:
        say({"error": type(error).__name__, "message": str(error)})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _environment() -> dict[str, str]:
    """The parent's environment, in which the child finds the same zreward."""
    roots = [str(Path(path).parent) for path in zreward.__path__[:1]]
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])])}


def _error(name: str, message: str, unknown: type[ZrewardError]) -> ZrewardError:
    cls = getattr(errors, name, unknown)
    return cls(message) if isinstance(cls, type) and issubclass(cls, ZrewardError) else unknown(message)


def _death(what: str, status: int, last_words: list[str]) -> str:
    cause = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = "; the machine may have run out of memory" if status == -9 else ""
    tail = "".join(last_words[-_STDERR_LINES:]).strip()
    return f"the process that {what} {cause}{hint}" + (f":\n{tail}" if tail else "")
