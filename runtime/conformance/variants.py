"""What is examined: the engines of a bundle with and without plugins, found or built, or a provider as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zreward.bundle import Bundle
from zreward.cuda_device import compute_capability
from zreward.engines import ENGINES_FOLDER, BuiltEngine, engine_name, select_engine
from zreward.errors import BackendError, UsageError
from zreward.plugins import LOCATION, PluginLibrary, find_library
from zreward.runtime.backends import OpenGraphs, open_graphs
from zreward.runtime.backends.providers import check_target
from zreward.runtime.conformance.plan import ConformancePlan
from zreward.tensorrt_library import FLAVOURS, flavour_named, load_tensorrt

Build = Callable[[Path | None, bool], None]
"""Builds an engine of the bundle, with a library of plugins or None; the flag allows it to replace one."""


@dataclass(frozen=True)
class Variant:
    """One thing to examine.

    Attributes:
        name: key in the report: "as_it_is", "without_plugins" or "with_plugins".
        title: for people.
        open: loads it.
        engine: that `open` loads, for a provider that runs engines.
        once: why there is no other variant, if so.
    """

    name: str
    title: str
    open: Callable[[], OpenGraphs]
    engine: BuiltEngine | None = None
    once: str = ""


def prepared(bundle: Bundle, plan: ConformancePlan, build: Build) -> tuple[Variant, ...]:
    """What is examined, with engines that fit this machine; those that there are not are built.

    Raises:
        BackendError: what the provider needs is missing, or the bundle was exported for another one.
        UsageError: plugins were asked for and there are none, or an engine is in the way of a new one.
        ZrewardError: whatever `build` raises.
    """
    check_target(bundle, plan.provider)
    if plan.provider not in FLAVOURS:
        if plan.build:
            raise UsageError(f"the provider {plan.provider} runs no engine of a bundle; leave --build out")
        return (_as_it_is(bundle, plan),)
    takes_plugins = flavour_named(plan.provider).takes_plugins
    once = "" if takes_plugins else f"{flavour_named(plan.provider).title} has no plugins in its networks"
    if plan.without_plugins and not once:
        once = "--no-plugins leaves them out"
    capability = compute_capability(plan.gpu.device)
    version = str(load_tensorrt(plan.provider).__version__)
    libraries: list[Path | None] = [None]
    if not once:
        libraries.append(_library(plan, version))
    return tuple(_engine(bundle, plan, build, capability, version, library, once) for library in libraries)


def _as_it_is(bundle: Bundle, plan: ConformancePlan) -> Variant:
    def opened() -> OpenGraphs:
        return open_graphs(bundle, provider=plan.provider, threads=plan.threads, gpu=plan.gpu)

    once = f"the provider {plan.provider} is examined once, as it is: it runs no engine of a bundle"
    return Variant("as_it_is", plan.provider, opened, once=once)


def _engine(
    bundle: Bundle,
    plan: ConformancePlan,
    build: Build,
    capability: str,
    version: str,
    library: Path | None,
    once: str,
) -> Variant:
    """The variant of an engine with the plugins of `library`, or without any."""
    from zreward.runtime.backends.tensorrt import open_engine

    def fitting() -> tuple[BuiltEngine | None, str]:
        try:
            found = select_engine(
                bundle,
                flavour=plan.provider,
                tensorrt_version=version,
                compute_capability=capability,
                plugins=library,
            )
        except BackendError as error:
            return None, str(error)
        if library is not None and not found.info.plugins:
            return None, f"{bundle.path}: it has no engine with the plugins of {library}"
        return found, ""

    engine, reason = (None, "") if plan.build else fitting()
    if engine is None:
        kinds = flavour_named(plan.provider).portable_to or (capability,)
        name = engine_name(plan.provider, kinds, with_plugins=library is not None)
        if not plan.build and (bundle.path / ENGINES_FOLDER / name).exists():
            raise UsageError(f"{reason} Or let this command replace {name} with --build")
        build(library, plan.build)
        engine, reason = fitting()
    if engine is None:
        raise BackendError(f"the engine that was built does not fit this machine: {reason}")

    def opened() -> OpenGraphs:
        return open_engine(bundle, flavour=plan.provider, device=plan.gpu.device, plugins=library)

    kind = "without" if library is None else "with"
    title = f"{kind} plugins"
    if library is None and engine.info.graphs["decoder"].plugin_layers:
        title = "with the score head as a Python plugin"
    return Variant(f"{kind}_plugins", title, opened, engine, once)


def _library(plan: ConformancePlan, version: str) -> Path:
    """The library of plugins, checked to be the one that was built, for this version of TensorRT."""
    path = plan.gpu.plugins or find_library()
    if path is None:
        raise UsageError(
            "there is no library of plugins: build one with `zreward plugins build --tensorrt DIR`, name one with "
            f"--gpu plugins=FILE or {LOCATION}, or examine engines without plugins alone with --no-plugins"
        )
    PluginLibrary.open(path).check_version(version)
    return path
