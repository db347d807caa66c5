"""Files that a command will write when its work is done, looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from zreward.commands import console
from zreward.errors import UsageError


def check_files(*files: tuple[str, Path | None]) -> None:
    """Make sure that files can be written; given by option and path, where one is asked for.

    Raises:
        UsageError: a folder is missing or closed, a path is a folder, or two options name the same file.
    """
    seen: dict[Path, str] = {}
    for option, path in files:
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent}: no such folder for {option}; create it first")
        if not os.access(path.absolute().parent, os.W_OK):
            raise UsageError(f"{path.parent}: nothing can be written here for {option}")
        if path.is_dir():
            raise UsageError(f"{path}: is a folder; {option} takes the name of a file")
        if path.absolute() in seen:
            raise UsageError(f"{path}: {seen[path.absolute()]} and {option} name the same file")
        seen[path.absolute()] = option


def say_written(*paths: Path | None) -> None:
    """Which files there are now."""
    written = [str(path) for path in paths if path is not None]
    if written:
        console.say(f"written: {', '.join(written)}")
