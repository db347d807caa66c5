"""Libraries of TensorRT plugins: what a built one says of itself, and how one is loaded.

    libzreward_plugins.so     the plugins of docs/tensorrt.md
    libzreward_plugins.json   its sha256, and what it was built with: `zreward plugins build` writes both

A shared library runs its code when it is opened, so it is hashed before: the record names the bytes, and a bundle names
the record's hash. Nothing here imports TensorRT; the caller hands its module over.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from zreward.errors import PluginError
from zreward.hashing import file_sha256
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json

NAMESPACE = "zreward"
VERSION = "1"
OPERATORS = ("RubricExpectation", "CausalConv1d", "GatedDeltaRule")
"""Names of the plugins, which are those of the graph's operators."""

LIBRARY_FILE = "libzreward_plugins.so"
KERNELS_FILE = "libzreward_kernels.so"

LOCATION = "ZREWARD_PLUGINS"
"""Environment variable: the library to use where none is named, in place of the one in the user's cache."""

_loaded: dict[tuple[str, str], Any] = {}
"""Handles by module and hash, for the life of the process."""


@dataclass(frozen=True)
class PluginRecord:
    """What the library is: hash and size in bytes, versions it was built with, and compute capabilities.

    `tensorrt` is None for a library of kernels alone; `plugins` are the names of the operators in it.
    """

    sha256: str
    bytes: int
    zreward: str
    kernels: int
    cuda: str
    architectures: tuple[str, ...]
    tensorrt: str | None
    plugins: tuple[str, ...]


@dataclass(frozen=True)
class PluginLibrary:
    """A library whose bytes are those of its record."""

    path: Path
    record: PluginRecord

    @classmethod
    def open(cls, path: Path | str, *, sha256: str | None = None) -> PluginLibrary:
        """Read the record and compare hashes; nothing of the library runs.

        Args:
            sha256: the hash that an engine was built with, where there is one.

        Raises:
            PluginError: the library or its record is missing, the bytes are not those of the record, or the hash is
                another than the engine's.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise PluginError(
                f"{path}: there is no plugin library here; build one with `zreward plugins build`"
            )
        record = _read_record(record_path(path))
        found = file_sha256(path)
        if found != record.sha256:
            raise PluginError(
                f"{path}: this library was altered after it was built (its sha256 is {found[:16]}…, its record says "
                f"{record.sha256[:16]}…); build it again with `zreward plugins build`"
            )
        if sha256 is not None and sha256 != found:
            raise PluginError(
                f"{path}: the engine was built with another plugin library (sha256 {sha256[:16]}…, found "
                f"{found[:16]}…); build the engine again, or name the library that it was built with, in {LOCATION} or "
                "with --gpu plugins=FILE"
            )
        return cls(path, record)

    def check_version(self, tensorrt_version: str) -> None:
        """Raises PluginError unless the library was built on headers of this major version of TensorRT.

        TensorRT's interfaces change their binary layout from one major version to the next, and a call through the
        wrong one ends the process.
        """
        built = self.record.tensorrt
        if built is None:
            raise PluginError(
                f"{self.path}: this library has kernels but no plugins; see `zreward plugins build --help`"
            )
        if built.split(".")[0] != tensorrt_version.split(".")[0]:
            raise PluginError(
                f"{self.path}: built for TensorRT {built}, but TensorRT {tensorrt_version} is installed; build it "
                "again with the headers of that version: `zreward plugins build --tensorrt DIR`"
            )

    def load(self, tensorrt: Any, registry: Any = None) -> Any:
        """Load the library into a plugin registry of a `tensorrt` module, whose parsers and engines then find it.

        Args:
            registry: that of a builder or runtime; by default the one that all share, which gets a library once.

        Returns:
            The registry's handle.

        Raises:
            PluginError: it was built for another version, this TensorRT has no plugins, or the registry refuses the
                library or lacks a plugin afterwards.
        """
        if not hasattr(tensorrt.INetworkDefinition, "add_plugin_v3"):
            # The registry of TensorRT-RTX 1.7.1 takes it, and its parser then ends the process.
            raise PluginError(
                f"{tensorrt.__name__} {tensorrt.__version__} has no plugins in its networks; go without them, the "
                "bodies of the operators compute the same"
            )
        self.check_version(tensorrt.__version__)
        if registry is not None:
            return self._load_into(registry, tensorrt.__version__)
        key = (tensorrt.__name__, self.record.sha256)
        if key not in _loaded:  # a registry refuses a second creator of the same name
            _loaded[key] = self._load_into(tensorrt.get_plugin_registry(), tensorrt.__version__)
        return _loaded[key]

    def _load_into(self, registry: Any, version: str) -> Any:
        handle = registry.load_library(str(self.path))
        missing = [
            name for name in self.record.plugins if registry.get_creator(name, VERSION, NAMESPACE) is None
        ]
        if handle is None or missing:
            raise PluginError(
                f"{self.path}: TensorRT {version} does not take this library (no plugin for "
                f"{', '.join(missing) or 'its handle'}); build it again with `zreward plugins build`"
            )
        return handle

    def check_contents(self) -> None:
        """Load the library and compare what it says of itself with its record. Runs its code; needs no GPU.

        Raises:
            PluginError: it cannot be loaded here, or holds something else.
        """
        found = described(self.path)
        record = self.record
        expected = {
            "tensorrt": record.tensorrt,
            "kernels": record.kernels,
            "plugins": [(name, VERSION, NAMESPACE) for name in record.plugins],
        }
        found["plugins"] = [(p["name"], p["version"], p["namespace"]) for p in found["plugins"]]
        if found != expected:
            raise PluginError(
                f"{self.path}: the library says it is {found}, its record says {expected}; build it again with "
                "`zreward plugins build`"
            )


def described(path: Path) -> dict[str, Any]:
    """What a library of plugins or kernels says of itself when it is loaded.

    Raises:
        PluginError: it cannot be loaded, or is none of ours.
    """
    try:
        library = ctypes.CDLL(str(path))
        kernels = int(library.zreward_kernels_version())
    except (OSError, AttributeError) as error:
        raise PluginError(f"{path}: this is no library of zreward's kernels ({error})") from None
    try:
        describe = library.zreward_plugins_describe
    except AttributeError:
        return {"tensorrt": None, "kernels": kernels, "plugins": []}
    describe.restype = ctypes.c_char_p
    description: dict[str, Any] = json.loads(describe())
    return description


def installed_tensorrt() -> str | None:
    """Version of the TensorRT that pip installed here, without importing it; None where there is none.

    Its Python bindings alone do not count: they can be there without the library.
    """
    for package in ("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt_cu13_libs", "tensorrt_cu12_libs"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def find_library() -> Path | None:
    """The library that `LOCATION` names, or the one that was built into the user's cache; None where neither is."""
    named = os.environ.get(LOCATION)
    if named:
        return Path(named)
    default = default_folder() / LIBRARY_FILE
    return default if default.is_file() else None


def default_folder() -> Path:
    """Where `zreward plugins build` puts a library unless told otherwise: zreward/plugins in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "zreward" / "plugins"


def record_path(library: Path) -> Path:
    """The JSON file beside a library."""
    return library.with_suffix(".json")


def write_record(library: Path, record: PluginRecord) -> None:
    """Write the record beside the library."""
    write_json(record_path(library), asdict(record))


def _read_record(path: Path) -> PluginRecord:
    if not path.is_file():
        raise PluginError(
            f"{path}: the record of the library is missing, so nothing says what it must contain; build it again with "
            "`zreward plugins build`"
        )
    return dataclass_from_json(PluginRecord, read_json_object(path, PluginError), str(path), PluginError)
