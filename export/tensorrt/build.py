"""The main path: a bundle of the target tensorrt to an engine in its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zreward
from zreward.bundle import Bundle, check_files
from zreward.cuda_device import compute_capability
from zreward.engines import (
    ENGINES_FOLDER,
    GRAPHS,
    BuiltEngine,
    EngineInfo,
    GraphEngine,
    Profile,
    engine_name,
    parse_capability,
    write_engine_info,
)
from zreward.errors import BundleError, UsageError
from zreward.export.plugins.quick_head import quick_head_ptx
from zreward.export.tensorrt.job import EngineFacts, EngineJob, PluginsOfJob
from zreward.export.tensorrt.profiles import profiles
from zreward.export.tensorrt.worker import build_in_child
from zreward.hashing import file_sha256
from zreward.lengths import MAX_IMAGES
from zreward.plugins import PluginLibrary, installed_tensorrt
from zreward.progress import Progress
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.staging import staged_directory
from zreward.tensorrt_library import Flavour, flavour_named

TARGET = "tensorrt"

_FLOAT8_SINCE = (8, 9)


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        plugins: library that `zreward plugins build` made, whose plugins take the place of operators of the domain
            zreward; None builds without. TensorRT alone has them.
        quick_head: compile the score head alone into the engine, as a Python plugin of TensorRT; needs no compiler of
            C++, but NVRTC.
        timing_cache: file that keeps what TensorRT measures, for the next build.
        compute_capabilities: for TensorRT-RTX, the GPUs to build for, such as "8.9", in order and each once; empty is
            all from 8.0 on, and for a bundle with floats of 8 bits 8.9 and 12.0.
        images: most images that are scored in one run; None is what the runtime scores together.
        optimization_level: 0, quick, to 5, thorough; None is the library's own.
        force: replace an engine of the same name.
    """

    flavour: str = "tensorrt"
    plugins: Path | None = None
    quick_head: bool = False
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    images: int | None = None
    optimization_level: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        flavour = flavour_named(self.flavour)
        if (self.plugins is not None or self.quick_head) and not flavour.takes_plugins:
            raise UsageError(f"{flavour.title} has no plugins; leave --plugins and --quick-head out")
        if self.plugins is not None and self.quick_head:
            raise UsageError("--plugins and --quick-head both have the score head; leave one of them out")
        if self.plugins is not None and not self.plugins.is_file():
            raise UsageError(f"{self.plugins}: no such library; `zreward plugins build` makes it")
        if self.compute_capabilities and not flavour.portable_to:
            raise UsageError(
                f"{flavour.title} builds for the GPU of this machine; --compute-capability is for tensorrt-rtx"
            )
        kinds = sorted({_capability(text) for text in self.compute_capabilities})
        object.__setattr__(self, "compute_capabilities", tuple(f"{major}.{minor}" for major, minor in kinds))
        if self.timing_cache is not None:
            _check_timing_cache(self.timing_cache, flavour)
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"the optimization level is 0 to 5, not {self.optimization_level}")


def _capability(text: str) -> tuple[int, int]:
    try:
        return parse_capability(text)
    except BundleError as error:
        raise UsageError(str(error)) from None


def _check_timing_cache(path: Path, flavour: Flavour) -> None:
    if flavour.portable_to:
        raise UsageError(f"{flavour.title} measures nothing while it builds; leave --timing-cache out")
    if path.is_dir():
        raise UsageError(f"{path}: a folder; --timing-cache names a file")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{path}: its folder does not exist")


def build_engine(path: str | Path, options: EngineOptions, progress: Progress | None = None) -> BuiltEngine:
    """Build engines of both graphs of the bundle at `path`, and put them into its directory.

    Raises:
        BackendError: the library is not installed, or there is no GPU where it needs one.
        BundleError: the bundle is damaged.
        ExportError: the library refuses a graph, cannot build it, or dies.
        PluginError: the plugins were altered or built for another version of TensorRT, or NVRTC is missing.
        UsageError: the bundle was exported for another target, or has such an engine already.
    """
    report = progress or (lambda stage, done, total: None)
    bundle = Bundle.open(path)
    if bundle.manifest.target != TARGET:
        raise UsageError(
            f"{bundle.path}: exported for {bundle.manifest.target!r}; TensorRT reads what `zreward export CHECKPOINT "
            f"-o BUNDLE --target {TARGET}` writes"
        )
    plugins = _opened(options.plugins)
    if options.quick_head:
        quick_head_ptx(0, 1e-6)  # or a missing compiler would show after the first engine is built
    kinds = _kinds_of_gpus(flavour_named(options.flavour), options, bundle)
    check_files(bundle)
    encoder = PromptEncoder(bundle.contract, load_tokenizer(bundle.path))
    sizes = profiles(bundle.contract, encoder, MAX_IMAGES if options.images is None else options.images)
    name = engine_name(options.flavour, kinds, with_plugins=plugins is not None)
    final = bundle.path / ENGINES_FOLDER / name
    with staged_directory(final, replace=options.force, kind="engine") as staging:
        built = {}
        for graph in GRAPHS:
            job = _job(bundle, options, kinds, graph, sizes[graph], staging.path, plugins)
            built[graph] = job, build_in_child(job, report)
        info = _described(bundle, options, kinds, built, plugins)
        write_engine_info(staging.path, info)
        staging.commit()
    return BuiltEngine(final, info)


def _opened(path: Path | None) -> PluginLibrary | None:
    """The library of plugins; one for another TensorRT is refused before anything is built."""
    if path is None:
        return None
    library = PluginLibrary.open(path)
    library.check_version(installed_tensorrt() or library.record.tensorrt or "")
    return library


def _job(
    bundle: Bundle,
    options: EngineOptions,
    kinds: tuple[str, ...],
    graph: str,
    sizes: tuple[Profile, ...],
    folder: Path,
    plugins: PluginLibrary | None,
) -> EngineJob:
    """The engine of one graph; operators that plugins take over are those of the decoder."""
    has_operators, flavour = graph == "decoder", flavour_named(options.flavour)
    left_open = not flavour.portable_to or kinds == flavour.portable_to
    return EngineJob(
        flavour=options.flavour,
        graph=str((bundle.path / bundle.manifest.graphs[graph]).resolve()),
        engine=str(folder / f"{graph}.engine"),
        profiles=sizes,
        plugins=(
            PluginsOfJob(str(plugins.path), plugins.record.sha256) if plugins and has_operators else None
        ),
        quick_head=options.quick_head and has_operators,
        timing_cache=str(options.timing_cache.resolve()) if options.timing_cache else None,
        compute_capabilities=() if left_open else kinds,
        optimization_level=options.optimization_level,
    )


def _kinds_of_gpus(flavour: Flavour, options: EngineOptions, bundle: Bundle) -> tuple[str, ...]:
    """Compute capabilities that the engine is for; TensorRT's is that of the GPU at hand."""
    quantization = bundle.manifest.quantization or {}
    has_float8 = any(layer.get("format") == "fp8" for layer in quantization.get("layers", {}).values())
    all_kinds = flavour.float8_kinds if has_float8 else flavour.portable_to
    kinds = options.compute_capabilities or all_kinds or (compute_capability(),)
    too_early = [kind for kind in kinds if has_float8 and parse_capability(kind) < _FLOAT8_SINCE]
    if too_early:
        raise UsageError(
            f"{bundle.path}: it multiplies floats of 8 bits, which GPUs do from compute capability "
            f"{'.'.join(map(str, _FLOAT8_SINCE))} on, not {too_early[0]}; export with --quant int8 for that one"
        )
    return kinds


def _described(
    bundle: Bundle,
    options: EngineOptions,
    kinds: tuple[str, ...],
    built: Mapping[str, tuple[EngineJob, EngineFacts]],
    plugins: PluginLibrary | None,
) -> EngineInfo:
    graphs = {}
    for name, (job, facts) in built.items():
        file = Path(job.engine)
        graphs[name] = GraphEngine(
            bytes=file.stat().st_size,
            sha256=file_sha256(file),
            inputs=facts.inputs,
            profiles=job.profiles,
            plugin_layers=facts.plugin_layers,
        )
    return EngineInfo(
        flavour=options.flavour,
        tensorrt_version=next(facts.tensorrt_version for _, facts in built.values()),
        compute_capabilities=kinds,
        precision=_precision(bundle),
        bundle_sha256=bundle.sha256,
        plugins={plugins.path.name: plugins.record.sha256} if plugins else {},
        graphs=graphs,
        zreward_version=zreward.__version__,
    )


def _precision(bundle: Bundle) -> str:
    """For example "fp16", or "int4, fp16": how weights are stored, and the type of the products."""
    quantization = bundle.manifest.quantization
    return (
        bundle.manifest.weights
        if quantization is None
        else f"{quantization['scheme']}, {bundle.manifest.weights}"
    )
