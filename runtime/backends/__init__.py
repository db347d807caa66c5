"""Inference backends: each runs the graphs of a bundle on arrays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zreward.bundle import Bundle
from zreward.cuda_device import compute_capability
from zreward.errors import BackendError, PluginError, UsageError
from zreward.lengths import MAX_IMAGES
from zreward.tensorrt_library import FLAVOURS

_log = logging.getLogger(__name__)

Array = NDArray[Any]

PROVIDERS = ("auto", "cpu", *FLAVOURS)


class Tensor(Protocol):
    """What one stage hands to the next: a NumPy array, or one that a backend keeps in its own memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __array__(self) -> Array: ...


class Session(Protocol):
    """One loaded graph. `run` may be called from several threads at once.

    Attributes:
        inputs: names of the graph's inputs, all of which `run` needs.
    """

    inputs: frozenset[str]

    def run(self, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        """The outputs: NumPy arrays, but states may be any `Tensor`, which the next run takes as it is."""


@dataclass(frozen=True)
class OpenGraphs:
    """The graphs of a bundle, ready to run.

    Attributes:
        provider: that runs them, never "auto".
        details: which library and what of it, for people.
        sessions: by the name of the graph.
        images: most images in one run.
        packages: distributions whose versions belong to what they compute.
        close: gives back what they hold outside of Python; runs after it are errors. Calling it twice is not.
    """

    provider: str
    details: str
    sessions: Mapping[str, Session]
    images: int = MAX_IMAGES
    packages: Sequence[str] = ()
    close: Callable[[], None] = lambda: None


def open_graphs(bundle: Bundle, *, provider: str, threads: int | None) -> OpenGraphs:
    """Load the graphs of `bundle`.

    Args:
        provider: "cpu"; "tensorrt" or "tensorrt-rtx" for an engine that `zreward engine` built; "auto" for such an
            engine where one runs on this machine, else the CPU.
        threads: see `open_session`.

    Raises:
        UsageError: an unknown provider, or a thread count below one.
        BackendError: what the provider needs is missing, or it refuses the graphs.
        BundleError, PluginError: see `open_engine`.
    """
    _check(provider, threads)
    if provider in FLAVOURS:
        from zreward.plugins import find_library
        from zreward.runtime.backends.tensorrt import open_engine

        return open_engine(bundle, flavour=provider, plugins=find_library())
    reasons: list[str] = []
    if provider == "auto":
        opened, reasons = _fitting_engine(bundle)
        if opened is not None:
            return opened
    try:
        sessions = {
            name: open_session(bundle.path / file, provider=provider, threads=threads)
            for name, file in bundle.manifest.graphs.items()
        }
    except BackendError as error:
        raise BackendError("; and ".join([str(error), *reasons])) from None
    return OpenGraphs("cpu", "ONNX Runtime on the CPU", sessions, packages=("onnxruntime",))


def open_session(path: Path, *, provider: str, threads: int | None, packed: bool = True) -> Session:
    """Load the graph at `path` with ONNX Runtime.

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
    _check(provider, threads)
    if provider in FLAVOURS:
        raise UsageError(f"an engine of {provider} is opened for a whole bundle, not for {path.name}")
    from zreward.runtime.backends.ort import OrtSession

    return OrtSession(path, threads=threads, packed=packed)


def _fitting_engine(bundle: Bundle) -> tuple[OpenGraphs | None, list[str]]:
    """The engine of `bundle` that runs on this machine, or why there is none."""
    from zreward.engines import engines_of
    from zreward.plugins import find_library
    from zreward.runtime.backends.tensorrt import open_engine

    flavours = {engine.info.flavour for engine in engines_of(bundle)} & set(FLAVOURS)
    if not flavours:
        return None, []
    try:
        compute_capability()
    except BackendError as error:
        return None, [f"its engines need a GPU ({error})"]
    reasons = []
    for flavour in sorted(flavours):
        try:
            return open_engine(bundle, flavour=flavour, plugins=find_library()), []
        except (BackendError, PluginError) as error:
            reasons.append(f"{flavour}: {error}")
    _log.warning(
        "scoring without the engines of the bundle, none of which runs here (%s)", "; ".join(reasons)
    )
    return None, reasons


def _check(provider: str, threads: int | None) -> None:
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; this version has {', '.join(PROVIDERS)}")
    if threads is not None and (not isinstance(threads, int | np.integer) or threads < 1):
        raise UsageError(f"threads must be a whole number of at least 1, not {threads!r}")
