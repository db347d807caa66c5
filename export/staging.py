"""A directory that appears under its final name complete, or not at all.

It is filled beside its final name and renamed. A killed export leaves a hidden directory named after its
process; the next export of the same name removes it once that process is gone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zreward.errors import UsageError


class Staging:
    """The directory under construction: fill `path`, then `commit`."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.parent / f".{final.name}.partial-{os.getpid()}"

    def commit(self) -> None:
        """Rename to the final name; an earlier directory there is moved aside first and then removed."""
        _sync_directory(self.path)
        old = self.final.parent / f".{self.final.name}.replaced-{os.getpid()}"
        if self.final.exists():
            self.final.rename(old)
        self.path.rename(self.final)
        _sync_directory(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged_directory(final: Path, *, replace: bool) -> Iterator[Staging]:
    """Stage a directory that will be named `final`.

    Raises:
        UsageError: `final` exists and `replace` is false, or is something that must not be replaced.
    """
    _check_final(final, replace=replace)
    final.parent.mkdir(parents=True, exist_ok=True)
    _restore_and_clean(final)
    staging = Staging(final)
    staging.path.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)


def _check_final(final: Path, *, replace: bool) -> None:
    if not final.name or final.name in (".", ".."):
        raise UsageError(f"{final}: name the bundle's directory itself")
    if not os.path.lexists(final):
        return
    if not replace:
        raise UsageError(f"{final} exists; choose another name, or replace it with --force")
    is_bundle = (final / "manifest.json").is_file()
    if final.is_symlink() or not final.is_dir() or (any(final.iterdir()) and not is_bundle):
        raise UsageError(f"{final} exists and is not a bundle; it is not replaced")


def _restore_and_clean(final: Path) -> None:
    """Undo what killed exports of this name left: put a replaced bundle back, remove partial ones."""
    for left in final.parent.glob(f".{final.name}.*-*"):
        kind, _, process = left.name.removeprefix(f".{final.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not process.isdigit() or _is_running(int(process)):
            continue
        if kind == "replaced" and not final.exists():
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
