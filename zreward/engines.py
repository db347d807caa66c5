"""Engines that TensorRT built from the graphs of a bundle: what they are, and what must fit before one is run.

An engine runs with the version of TensorRT and on the kind of GPU that it was built for, from the bundle that it was
built from. It lies in the bundle's directory without being part of it, so that the bundle's own hashes stay what they
are wherever it is deployed:

    engines/NAME/engine.json      what it was built from, by and for: `EngineInfo`
    engines/NAME/vision.engine, decoder.engine

`zreward engine BUNDLE` writes one (`zreward.export.tensorrt`), and the runtime picks one with `select_engine`. All that
can be known without TensorRT and without a GPU is checked here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zreward.bundle import Bundle
from zreward.errors import BackendError, BundleError
from zreward.hashing import file_sha256
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json
from zreward.plugins import LOCATION

_log = logging.getLogger(__name__)

ENGINES_FOLDER = "engines"
ENGINE_FILE = "engine.json"
GRAPHS = ("vision", "decoder")

PATCHES = "total_patches"
"""Axis of the tower."""
BATCH, TOKENS, PAST = "batch", "sequence_len", "past_sequence_len"
"""Axes of the decoder: rows, tokens that each reads, and tokens that were read before."""
STATES = "state_batch"
"""Axis of the decoder that has a row for each image."""

IMAGE, PREFIX, QUESTIONS = "image", "prefix", "questions"
"""Names of the profiles: that of the tower, and the two of the decoder."""

_SCHEMA = {"schema": "zreward.engine", "version": 1}
_AGAIN = "build the engine again with `zreward engine BUNDLE --force`"

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """Sizes that one optimization profile of an engine takes.

    Attributes:
        name: what it is for.
        axes: least, typical and largest size of each axis of the inputs that is not fixed, by its name.
    """

    name: str
    axes: Mapping[str, Sizes]

    def __post_init__(self) -> None:
        for axis, (least, typical, largest) in self.axes.items():
            if not 0 <= least <= typical <= largest:
                raise BundleError(
                    f"profile {self.name!r}: {axis} of {least} to {typical} to {largest} is no range"
                )

    def misfit(self, sizes: Mapping[str, int]) -> str | None:
        """Which of `sizes` the profile does not take, in words; None where it takes all."""
        for axis, size in sizes.items():
            least, _, largest = self.axes[axis]
            if not least <= size <= largest:
                return f"{axis} is {size:,}, and {self.name!r} takes {least:,} to {largest:,}"
        return None


@dataclass(frozen=True)
class GraphEngine:
    """The engine of one graph.

    Attributes:
        bytes: size of its file.
        sha256: of its file.
        inputs: shape of each input, sizes that vary by the names of their axes.
        profiles: in the order of the engine.
        plugin_layers: how many layers are plugins.
    """

    bytes: int
    sha256: str
    inputs: Mapping[str, tuple[int | str, ...]]
    profiles: tuple[Profile, ...]
    plugin_layers: int = 0

    def __post_init__(self) -> None:
        named = {axis for shape in self.inputs.values() for axis in shape if isinstance(axis, str)}
        for profile in self.profiles:
            if set(profile.axes) != named:
                raise BundleError(
                    f"profile {profile.name!r} has the axes {sorted(profile.axes)}, not {sorted(named)}"
                )
        if not self.profiles:
            raise BundleError("an engine has at least one profile")

    def profile_for(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The first profile that takes inputs of these shapes.

        Raises:
            BackendError: an input is missing or of another rank or fixed size, two inputs contradict each other, or
                no profile takes the sizes.
        """
        sizes: dict[str, int] = {}
        for name, expected in self.inputs.items():
            found = shapes.get(name, ())
            if not _is_like(found, expected):
                raise BackendError(f"input {name!r}: the engine takes {list(expected)}, not {found}")
            for axis, size in zip(expected, found, strict=True):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise BackendError(
                        f"input {name!r} of {list(found)}: {axis} is {sizes[axis]} in the inputs before it"
                    )
        misfits = [profile.misfit(sizes) for profile in self.profiles]
        if None in misfits:
            return misfits.index(None)
        raise BackendError(
            f"no profile of the engine takes these inputs ({'; '.join(str(m) for m in misfits)}); build one for more "
            "with `zreward engine BUNDLE --images N --force`, or split the batch"
        )


@dataclass(frozen=True)
class EngineInfo:
    """The content of engine.json.

    Attributes:
        flavour: "tensorrt" or "tensorrt-rtx".
        tensorrt_version: of the library that built it, the only one that runs it.
        compute_capabilities: GPUs that it was built for: "8.9" is one kind, "8.0+" is that and every later one.
        precision: in which types it computes, for people.
        bundle_sha256: of the manifest of the bundle that it was built from.
        plugins: sha256 of each library of plugins that it needs, by file name.
        graphs: the engine of each graph.
        zreward_version: that built it.
    """

    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    bundle_sha256: str
    plugins: Mapping[str, str]
    graphs: Mapping[str, GraphEngine]
    zreward_version: str

    def __post_init__(self) -> None:
        if set(self.graphs) != set(GRAPHS):
            raise BundleError(f"an engine has the graphs {', '.join(GRAPHS)}, not {sorted(self.graphs)}")
        for capability in self.compute_capabilities:
            parse_capability(capability.removesuffix("+"))

    def runs_on(self, compute_capability: str) -> bool:
        """Whether it was built for GPUs like this one."""
        device = parse_capability(compute_capability)
        return any(
            device >= parse_capability(built[:-1])
            if built.endswith("+")
            else device == parse_capability(built)
            for built in self.compute_capabilities
        )


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in a bundle's directory."""

    path: Path
    info: EngineInfo

    def read(self, graph: str) -> bytes:
        """The serialized engine of a graph, as it was written: nothing else may reach TensorRT, which trusts it.

        Raises:
            BundleError: the file is missing, cut short or altered.
        """
        file = self.file(graph)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise BundleError(f"{file}: the engine cannot be read ({error.strerror}); {_AGAIN}") from None
        self._check(graph, len(data), hashlib.sha256(data).hexdigest())
        return data

    def check_files(self) -> None:
        """Make sure that the engine of each graph is as it was written; errors as `read`."""
        for graph in self.info.graphs:
            file = self.file(graph)
            try:
                self._check(graph, file.stat().st_size, file_sha256(file))
            except OSError as error:
                raise BundleError(f"{file}: the engine cannot be read ({error.strerror}); {_AGAIN}") from None

    def _check(self, graph: str, n_bytes: int, sha256: str) -> None:
        file, entry = self.file(graph), self.info.graphs[graph]
        if n_bytes != entry.bytes:
            raise BundleError(
                f"{file}: the engine has {n_bytes:,} bytes and should have {entry.bytes:,}, it was cut short or "
                f"altered; {_AGAIN}"
            )
        if sha256 != entry.sha256:
            raise BundleError(f"{file}: the engine was altered (its sha256 differs); {_AGAIN}")

    def file(self, graph: str) -> Path:
        return self.path / f"{graph}.engine"

    def has_plugins(self, library: Path | None) -> bool:
        """Whether it needs no plugins, or was built with those of `library`."""
        try:
            self.check_plugins(library)
        except BackendError:
            return False
        return True

    def check_plugins(self, library: Path | None) -> None:
        """Make sure that `library` is the one that the engine was built with, before it is loaded.

        Raises:
            BackendError: it is missing, or another one.
        """
        for name, expected in self.info.plugins.items():
            if library is None or not library.is_file():
                where = f"; {library} does not exist" if library else ""
                raise BackendError(
                    f"{self.path}: the engine was built with the plugins of {name}{where}; name the library, in "
                    f"{LOCATION} or with --gpu plugins=FILE, build it with `zreward plugins build`, or build an engine "
                    "without plugins with `zreward engine BUNDLE --no-plugins`"
                )
            if file_sha256(library) != expected:
                raise BackendError(
                    f"{library}: not the {name} that the engine was built with (its sha256 differs), so it is not "
                    f"loaded; build the engine again with `zreward engine BUNDLE --plugins {library} --force`"
                )


def engine_name(flavour: str, compute_capabilities: Sequence[str], *, with_plugins: bool) -> str:
    """The name of an engine's directory; a bundle has one engine of a name, whatever version built it."""
    kinds = "-".join(f"sm{capability.replace('.', '')}" for capability in compute_capabilities)
    return f"{flavour}-{kinds}{'-plugins' if with_plugins else ''}"


def engines_of(bundle: Bundle) -> tuple[BuiltEngine, ...]:
    """All engines in the directory of `bundle`, by their names.

    Raises:
        BundleError: an engine.json is not what this version reads.
    """
    return tuple(_engines(bundle.path))


def select_engine(
    bundle: Bundle,
    *,
    flavour: str,
    tensorrt_version: str,
    compute_capability: str,
    plugins: Path | None = None,
) -> BuiltEngine:
    """The engine of `bundle` that runs here; one with plugins where `plugins` is the library that it was built with.

    Args:
        flavour: "tensorrt" or "tensorrt-rtx".
        tensorrt_version: of the library that is installed.
        compute_capability: of the GPU, for example "8.9".
        plugins: a library of plugins to load.

    Raises:
        BackendError: there is none, or each was built from another bundle, by another version, for another GPU or with
            other plugins; the message says what each was built for, and how to build one that fits.
    """
    command = f"zreward engine {bundle.path}" + ("" if flavour == "tensorrt" else f" --flavour {flavour}")
    reasons, fitting = [], []
    for engine in engines_of(bundle):
        if engine.info.flavour == flavour:
            reason = _misfit(engine.info, bundle, tensorrt_version, compute_capability)
            reasons += [f"{engine.path.name} {reason}"] if reason else []
            fitting += [] if reason else [engine]
    if not fitting:
        found = "; ".join(reasons) or f"it has no engine of {flavour}"
        raise BackendError(f"{bundle.path}: {found}. Build one for this machine with `{command}`")
    fitting.sort(key=lambda engine: not engine.info.plugins)
    runnable = [engine for engine in fitting if engine.has_plugins(plugins)]
    chosen = (runnable or fitting)[0]
    chosen.check_plugins(plugins)
    if plugins is not None and chosen != fitting[0]:
        _log.warning(
            "%s runs without plugins, since %s was built with others than %s; build it again to have them",
            chosen.path,
            fitting[0].path.name,
            plugins,
        )
    return chosen


def write_engine_info(path: Path, info: EngineInfo) -> None:
    """Write engine.json into the directory of an engine."""
    write_json(path / ENGINE_FILE, {**_SCHEMA, **dataclasses.asdict(info)})


def parse_capability(text: str) -> tuple[int, int]:
    """(8, 9) of "8.9".

    Raises:
        BundleError: it is not of this form.
    """
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise BundleError(f"compute capability {text!r} is not of the form 8.9")
    return int(major), int(minor)


def _engines(path: Path) -> Iterator[BuiltEngine]:
    for file in sorted((path / ENGINES_FOLDER).glob(f"[!.]*/{ENGINE_FILE}")):
        data: dict[str, Any] = read_json_object(file, BundleError)
        for key, expected in _SCHEMA.items():
            if data.pop(key, None) != expected:
                raise BundleError(
                    f"{file}: its {key} is not {expected!r}; build the engine again with this zreward"
                )
        yield BuiltEngine(file.parent, dataclass_from_json(EngineInfo, data, str(file), BundleError))


def _misfit(info: EngineInfo, bundle: Bundle, version: str, capability: str) -> str | None:
    """Why an engine does not run here; None where it does."""
    if info.bundle_sha256 != bundle.sha256:
        return "was built from another export of this bundle"
    if info.tensorrt_version != version:
        return f"was built by version {info.tensorrt_version}, and {version} is installed"
    if not info.runs_on(capability):
        built = _listed(info.compute_capabilities)
        return f"was built for compute capability {built}, and this GPU has {capability}"
    return None


def _is_like(found: Sequence[int], expected: Sequence[int | str]) -> bool:
    """Whether a shape has the rank and the fixed sizes of another."""
    if len(found) != len(expected):
        return False
    return all(isinstance(axis, str) or axis == size for axis, size in zip(expected, found, strict=True))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("+", " and later") for name in names)
