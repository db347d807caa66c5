"""What crosses the border to the process that builds an engine, as JSON: the job, and what it built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zreward.engines import Profile


@dataclass(frozen=True)
class PluginsOfJob:
    """The library of plugins to load: its file, and the sha256 that the engine's record will name."""

    path: str
    sha256: str


@dataclass(frozen=True)
class EngineJob:
    """One engine to build.

    Attributes:
        flavour: see `zreward.tensorrt_library`.
        graph: ONNX file.
        engine: file to write.
        profiles: sizes to optimize for, by the names of the graph's axes.
        plugins: to load, or None.
        quick_head: whether the score head is TensorRT's Python plugin.
        timing_cache: file that timings of kernels are read from and added to, or None.
        compute_capabilities: kinds of GPUs to build for; empty leaves it to the library.
        optimization_level: 0 to 5; None is the library's own.
    """

    flavour: str
    graph: str
    engine: str
    profiles: tuple[Profile, ...]
    plugins: PluginsOfJob | None = None
    quick_head: bool = False
    timing_cache: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None


@dataclass(frozen=True)
class EngineFacts:
    """What was built: the library's version, the shapes of the inputs, and how many layers are plugins."""

    tensorrt_version: str
    inputs: Mapping[str, tuple[int | str, ...]]
    plugin_layers: int
