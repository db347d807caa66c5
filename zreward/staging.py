"""A directory that appears under its final name complete, or not at all.

It is filled beside its final name and renamed. A killed process leaves a hidden directory named after it; the
next writer of the same name removes it once that process is gone, and puts a directory back that was moved
aside and not yet replaced. Bundles, quantized checkpoints and engines are written this way.
"""

from __future__ import annotations

import glob
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zreward.errors import UsageError

# What an earlier directory must contain to be replaced: nothing else is ever deleted.
_MARKERS = {"bundle": "manifest.json", "checkpoint": "config.json", "engine": "engine.json"}

# Staged by this process. Containers number their processes alike, so a leftover may bear our own id.
_staged_here: set[Path] = set()
_lock = threading.Lock()


class Staging:
    """The directory under construction: fill `path`, then `commit`."""

    def __init__(self, final: Path, *, replace: bool, kind: str) -> None:
        self.final = final
        self.kind = kind
        self.path = final.parent.resolve() / f".{final.name}.partial-{os.getpid()}"
        self._replace = replace

    def commit(self) -> None:
        """Rename to the final name; an earlier directory there is moved aside first and then removed.

        Raises:
            UsageError: something appeared under the final name meanwhile, and must not be replaced.
        """
        _check_final(self.final, replace=self._replace, kind=self.kind)
        _sync_directory(self.path)
        old = self.final.parent / f".{self.final.name}.replaced-{os.getpid()}"
        if self.final.exists():
            self.final.rename(old)
        try:
            self.path.rename(self.final)
        except OSError:
            if old.exists():
                old.rename(self.final)
            raise
        _sync_directory(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staged_directory(final: Path, *, replace: bool, kind: str = "bundle") -> Iterator[Staging]:
    """Stage a directory that will be named `final`.

    Args:
        final: the name it will have.
        replace: whether an earlier one of this kind under that name is replaced.
        kind: "bundle", "checkpoint" or "engine".

    Raises:
        UsageError: `final` exists and `replace` is false, is something that must not be replaced, or lies
            where nothing can be written.
    """
    if not final.name or final.name in (".", ".."):
        raise UsageError(f"{final}: name the {kind}'s directory itself")
    staging = Staging(final, replace=replace, kind=kind)
    with _lock:
        if staging.path in _staged_here:
            raise UsageError(f"{final}: this process is writing it already")
        try:
            _restore_and_clean(final)
            _check_final(final, replace=replace, kind=kind)
            staging.path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"{final}: cannot be written here ({error.strerror}: {error.filename})"
            ) from None
        _staged_here.add(staging.path)
    try:
        yield staging
    finally:
        shutil.rmtree(staging.path, ignore_errors=True)
        _staged_here.discard(staging.path)


def _check_final(final: Path, *, replace: bool, kind: str) -> None:
    """Refuse a name that exists and `replace` is false, or that is something else than a `kind`."""
    if not os.path.lexists(final):
        return
    if not replace:
        raise UsageError(f"{final} exists; choose another name, or replace it with --force")
    is_ours = (final / _MARKERS[kind]).is_file()
    if final.is_symlink() or not final.is_dir() or (any(final.iterdir()) and not is_ours):
        raise UsageError(f"{final} exists and is not a {kind}; it is not replaced")


def _restore_and_clean(final: Path) -> None:
    """Undo what killed writers of this name left: put a replaced directory back, remove partial ones."""
    for left in final.parent.glob(f".{glob.escape(final.name)}.*-*"):
        kind, _, process = left.name.removeprefix(f".{final.name}.").rpartition("-")
        if kind not in ("partial", "replaced") or not process.isdigit() or _is_other_process(int(process)):
            continue
        if kind == "replaced" and not os.path.lexists(final):
            left.rename(final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_other_process(process: int) -> bool:
    """Whether `process` runs and is not this one, which has staged nothing for this name yet."""
    if process == os.getpid():
        return False
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
