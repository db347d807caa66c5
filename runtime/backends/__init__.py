"""Inference backends: each opens one graph of a bundle and runs it on numpy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zreward.errors import UsageError

Array = NDArray[Any]

PROVIDERS = ("auto", "cpu")


class Session(Protocol):
    """One loaded graph. `run` may be called from several threads at once.

    Attributes:
        inputs: names of the graph's inputs, all of which `run` needs.
    """

    inputs: frozenset[str]

    def run(self, outputs: list[str], inputs: dict[str, Array]) -> list[Array]: ...


def open_session(path: Path, *, provider: str, threads: int | None, packed: bool = True) -> Session:
    """Load the graph at `path`.

    Args:
        path: an ONNX file of the bundle.
        provider: "cpu", or "auto" for the best one that is installed.
        threads: threads per run; None lets the backend choose (one per physical core).
        packed: False keeps no packed copies of the weights: little memory, slow, and for codes of 4 and 8 bits
            other arithmetic. It is for finding out whether a large graph loads.

    Raises:
        UsageError: an unknown provider, or a thread count below one.
        BackendError: the backend is not installed, or refuses the graph.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; this version has {', '.join(PROVIDERS)}")
    if threads is not None and (not isinstance(threads, int | np.integer) or threads < 1):
        raise UsageError(f"threads must be a whole number of at least 1, not {threads!r}")
    from zreward.runtime.backends.ort import OrtSession

    return OrtSession(path, threads=threads, packed=packed)
