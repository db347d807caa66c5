"""One graph to one engine, in the interface that TensorRT and TensorRT-RTX share (versions 10.16 to 11.4, and 1.7).

Networks are strongly typed: the graph says what runs in which type, and quantization is in it. So no flag asks for a
precision, and none turns TensorFloat-32 on: products that the graph keeps in float32 are kept there on purpose.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from zreward.engines import Profile, parse_capability
from zreward.errors import ExportError, PluginError
from zreward.export.plugins.quick_head import register_quick_head
from zreward.export.tensorrt.job import EngineFacts, EngineJob, PluginsOfJob
from zreward.plugins import PluginLibrary
from zreward.progress import Progress
from zreward.tensorrt_library import error_listener, quoted

_SHOWN_ERRORS = 3


def build(trt: ModuleType, job: EngineJob, report: Progress) -> EngineFacts:
    """Parse the graph and write its engine.

    Args:
        trt: the library's module.
        job: what to build.
        report: hears of the steps of the builder.

    Raises:
        ExportError: the library cannot start, refuses the graph or a profile, or cannot build it.
        PluginError: the plugins were altered or built for another version, or this TensorRT does not take them.
    """
    said: list[str] = []
    listener = error_listener(trt, said)  # the library keeps no reference to what it calls back
    monitor = _monitor(trt, f"building {Path(job.engine).name}", report)
    builder = _started(trt, listener, said)
    if job.plugins is not None:
        _load_plugins(trt, builder, job.plugins, said)
    if job.quick_head:
        register_quick_head(trt)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(job.graph):
        raise ExportError(
            f"{job.graph}: the parser of TensorRT {trt.__version__} refuses it: {_refusal(parser)}"
        )
    n_plugins = _plugin_layers(trt, network)
    if (job.plugins is not None or job.quick_head) and n_plugins == 0:
        loaded = job.plugins.path if job.plugins else "the Python plugin of the head"
        raise ExportError(f"{loaded}: no operator of {Path(job.graph).name} became a plugin{quoted(said)}")
    config = _configured(trt, builder, job, monitor)
    inputs = _input_shapes(network)
    for profile in job.profiles:
        _add_profile(builder, config, profile, inputs, job.graph, said)
    cache = _timing_cache(config, job, said)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{job.graph}: TensorRT {trt.__version__} cannot build it{quoted(said)}")
    Path(job.engine).write_bytes(engine)
    if cache is not None and job.timing_cache is not None:
        Path(job.timing_cache).write_bytes(cache.serialize())
    return EngineFacts(str(trt.__version__), inputs, n_plugins)


def _started(trt: ModuleType, listener: Any, said: list[str]) -> Any:
    try:
        return trt.Builder(listener)
    except (TypeError, RuntimeError) as error:  # a constructor of pybind11 that was given no object
        raise ExportError(
            f"TensorRT {trt.__version__} does not start{quoted([*said, str(error)])}; it builds where its GPU and "
            "driver are, which `nvidia-smi` shows. TensorRT-RTX builds without one: --flavour tensorrt-rtx"
        ) from None


def _load_plugins(trt: ModuleType, builder: Any, plugins: PluginsOfJob, said: list[str]) -> None:
    try:
        library = PluginLibrary.open(plugins.path, sha256=plugins.sha256)
        library.load(trt, builder.get_plugin_registry())
    except PluginError as error:
        raise PluginError(f"{error}{quoted(said)}") from None


def _configured(trt: ModuleType, builder: Any, job: EngineJob, monitor: Any) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or an inspector could not show plugins
    config.progress_monitor = monitor
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for index, capability in enumerate(job.compute_capabilities):
            name = "SM{}{}".format(*parse_capability(capability))
            known = getattr(trt.ComputeCapability, name, None)
            if known is None or not config.set_compute_capability(known, index):
                raise ExportError(
                    f"TensorRT {trt.__version__} does not build for compute capability {capability}"
                )
    return config


def _add_profile(
    builder: Any,
    config: Any,
    profile: Profile,
    inputs: dict[str, tuple[int | str, ...]],
    graph: str,
    said: list[str],
) -> None:
    added = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if any(isinstance(axis, str) for axis in shape):
            sizes = [
                [axis if isinstance(axis, int) else profile.axes[axis][i] for axis in shape] for i in range(3)
            ]
            added.set_shape(name, *sizes)
    if config.add_optimization_profile(added) < 0:
        raise ExportError(
            f"{graph}: TensorRT refuses the sizes of the profile {profile.name!r}{quoted(said)}"
        )


def _timing_cache(config: Any, job: EngineJob, said: list[str]) -> Any:
    """The cache in use, or None: what an earlier build for this kind of GPU has measured is not measured again."""
    if job.timing_cache is None:
        return None
    path = Path(job.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise ExportError(
            f"{path}: not timings of this GPU and this TensorRT{quoted(said)}; name another --timing-cache"
        )
    return cache


def _input_shapes(network: Any) -> dict[str, tuple[int | str, ...]]:
    """Shape of each input, axes that vary by their names in the graph."""
    shapes = {}
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shapes[str(value.name)] = tuple(
            size if size >= 0 else str(value.get_dimension_name(axis))
            for axis, size in enumerate(value.shape)
        )
    return shapes


def _plugin_layers(trt: ModuleType, network: Any) -> int:
    types = [network.get_layer(index).type for index in range(network.num_layers)]
    return types.count(trt.LayerType.PLUGIN_V3)


def _monitor(trt: ModuleType, stage: str, report: Progress) -> Any:
    """Reports the steps of the outermost phase, under the name of the stage."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]  # as above
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                report(stage, step, self.steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                report(stage, self.steps[phase_name], self.steps[phase_name])

    return Monitor()


def _refusal(parser: Any) -> str:
    """The parser's first errors, with the operators that they are about."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    shown = [
        f"{e.desc()} (operator {e.node_operator()}, node {e.node_name()})" for e in errors[:_SHOWN_ERRORS]
    ]
    return "; ".join(shown) or "it names no error"
