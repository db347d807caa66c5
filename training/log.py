"""What a run writes about itself: `log.jsonl`, one event a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zreward import __version__
from zreward.jsonfile import write_text

LOG_FILE = "log.jsonl"
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy", "tokenizers", "pillow")


class TrainingLog:
    """The log of one run; a resumed run goes on in it, without the lines of steps that it repeats."""

    def __init__(self, directory: Path, *, first_step: int = 0) -> None:
        self._path = directory / LOG_FILE
        self._started = time.monotonic()
        lines = _lines(self._path) if first_step else []
        kept = [line for line in lines if json.loads(line).get("step", 0) <= first_step]
        write_text(self._path, "".join(line + "\n" for line in kept))
        self._board = _board(directory, first_step)

    def event(self, kind: str, **values: Any) -> None:
        """Append one event; numbers that are not finite become null."""
        seconds = round(time.monotonic() - self._started, 2)
        line = json.dumps(_finite({"event": kind, **values, "seconds": seconds}), ensure_ascii=False)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if self._board is not None and "step" in values:
            for name, value in _numbers(values):
                self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def environment() -> dict[str, str]:
    """Versions of everything that a result depends on."""
    found = {"zreward": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _lines(path: Path) -> list[str]:
    """Whole lines of an earlier log; the last one may have been cut off by a kill."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _board(directory: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # tensorboard is a convenience: the log has everything
        return None
    return SummaryWriter(directory / "tensorboard", purge_step=first_step + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found.append((prefix + key, float(value)))
    return found
