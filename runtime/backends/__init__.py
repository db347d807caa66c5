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
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.providers import ORT_PROVIDERS, check_options, check_target
from zreward.tensorrt_library import FLAVOURS

_log = logging.getLogger(__name__)

Array = NDArray[Any]


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


def open_graphs(
    bundle: Bundle, *, provider: str, threads: int | None, gpu: GpuOptions | None = None
) -> OpenGraphs:
    """Load the graphs of `bundle`.

    Args:
        provider: "cpu"; "tensorrt" or "tensorrt-rtx" for an engine that `zreward engine` built; "cuda" or
            "ort-tensorrt" for ONNX Runtime on a GPU; "auto" for what the bundle was exported for where that runs on
            this machine, an engine or "cuda", else the CPU.
        threads: see `open_session`.
        gpu: how a GPU is used, where one is.

    Raises:
        UsageError: an unknown provider, a thread count below one, or an option that the provider does not take.
        BackendError: what the provider needs is missing, it refuses the graphs, or the bundle was exported for another.
        BundleError: a file of the engine was altered.
        PluginError: a library of plugins is missing or was altered, or does not fit.
    """
    gpu = gpu or GpuOptions()
    _check(provider, threads, gpu)
    return _open_best(bundle, threads, gpu) if provider == "auto" else _open(bundle, provider, threads, gpu)


def open_session(path: Path, *, provider: str, threads: int | None, packed: bool = True) -> Session:
    """Load the graph at `path` with ONNX Runtime on the CPU.

    Args:
        path: an ONNX file of the bundle.
        provider: "cpu" or "auto"; the others open whole bundles.
        threads: threads per run; None lets the backend choose (one per physical core).
        packed: False keeps no packed copies of the weights: little memory, slow, and for codes of 4 and 8 bits
            other arithmetic. It is for finding out whether a large graph loads.

    Raises:
        UsageError: another provider, or a thread count below one.
        BackendError: the backend is not installed, or refuses the graph.
    """
    _check(provider, threads, GpuOptions())
    if provider not in ("auto", "cpu"):
        raise UsageError(f"{provider} runs whole bundles, not {path.name} alone; open the bundle")
    from zreward.runtime.backends.ort import OrtSession

    return OrtSession(path, threads=threads, packed=packed)


def _open(bundle: Bundle, provider: str, threads: int | None, gpu: GpuOptions) -> OpenGraphs:
    """By a provider that is not "auto"."""
    check_target(bundle, provider)
    if provider in FLAVOURS:
        from zreward.plugins import PluginLibrary, find_library
        from zreward.runtime.backends.tensorrt import open_engine

        plugins = PluginLibrary.open(gpu.plugins).path if gpu.plugins is not None else find_library()
        return open_engine(bundle, flavour=provider, device=gpu.device, plugins=plugins)
    if provider in ORT_PROVIDERS:
        from zreward.runtime.backends.ort_gpu import open_on_gpu

        return open_on_gpu(bundle, provider=provider, threads=threads, gpu=gpu)
    sessions = {
        name: open_session(bundle.path / file, provider=provider, threads=threads)
        for name, file in bundle.manifest.graphs.items()
    }
    return OpenGraphs("cpu", "ONNX Runtime on the CPU", sessions, packages=("onnxruntime",))


def _open_best(bundle: Bundle, threads: int | None, gpu: GpuOptions) -> OpenGraphs:
    """By what `bundle` was exported for, or by the CPU: without a word where there is no GPU, else with the reason."""
    on_gpu, reasons = _exported_for(bundle), []
    if on_gpu:
        try:
            compute_capability()
        except BackendError as error:
            on_gpu, reasons = [], [f"a GPU, which it was exported for, is not here ({error})"]
    for provider in on_gpu:
        check_options(provider, gpu)
        try:
            return _open(bundle, provider, threads, gpu)
        except (BackendError, PluginError) as error:
            reasons.append(f"{provider}: {error}")
    try:
        opened = _open(bundle, "cpu", threads, gpu)
    except BackendError as error:
        raise BackendError("; and ".join([str(error), *reasons])) from None
    if on_gpu:
        _log.warning(
            "scoring on the CPU, since what the bundle was exported for does not run here (%s)",
            "; ".join(reasons),
        )
    return opened


def _exported_for(bundle: Bundle) -> list[str]:
    """Providers on a GPU that may run `bundle` as it is: those of engines that it has, or the CUDA provider."""
    if bundle.manifest.target == "cuda":
        return ["cuda"]
    from zreward.engines import engines_of

    return sorted({engine.info.flavour for engine in engines_of(bundle)} & set(FLAVOURS))


def _check(provider: str, threads: int | None, gpu: GpuOptions) -> None:
    check_options(provider, gpu)
    if threads is not None and (not isinstance(threads, int | np.integer) or threads < 1):
        raise UsageError(f"threads must be a whole number of at least 1, not {threads!r}")
