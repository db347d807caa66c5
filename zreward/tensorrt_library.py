"""The two libraries that build and run engines: TensorRT, and TensorRT for RTX. Neither is imported before it is asked.

Their Python interfaces have the same names. TensorRT builds on the GPU that will run the engine. TensorRT-RTX builds
without one, for all kinds of GPUs of a range, and compiles the last step where it runs; it takes no plugins.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from zreward.errors import BackendError, UsageError

_SHOWN_ERRORS = 3


@dataclass(frozen=True)
class Flavour:
    """One of the libraries.

    Attributes:
        title: its name.
        modules: that have its interface, the first that can be imported is taken.
        install: the command that installs it.
        portable_to: compute capabilities of an engine that was built for no one in particular; empty where it is
            built for the GPU at hand.
        float8_kinds: the same of graphs with floats of 8 bits, which earlier GPUs do not multiply.
        takes_plugins: whether it may load plugins.
        package: distribution whose version is the library's.
    """

    title: str
    modules: tuple[str, ...]
    install: str
    portable_to: tuple[str, ...]
    float8_kinds: tuple[str, ...]
    takes_plugins: bool
    package: str


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt": Flavour(
        "TensorRT",
        ("tensorrt", "tensorrt_bindings"),
        "pip install 'zreward[tensorrt]'",
        (),
        (),
        True,
        "tensorrt",
    ),
    "tensorrt-rtx": Flavour(
        "TensorRT-RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        "pip install 'zreward[tensorrt-rtx]'",
        ("8.0+",),
        ("8.9", "12.0"),
        False,
        "tensorrt_rtx_cu13_libs",
    ),
}


def flavour_named(name: str) -> Flavour:
    """The library of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in FLAVOURS:
        raise UsageError(f"unknown flavour {name!r}; choose from {', '.join(FLAVOURS)}")
    return FLAVOURS[name]


def load_tensorrt(name: str) -> ModuleType:
    """Import the library of this name; one process should load one of them alone.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
        UsageError: there is none of this name.
    """
    flavour, problems = flavour_named(name), []
    for module in flavour.modules:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:
            problems.append(f"{module}: {error}")
    raise BackendError(
        f"{flavour.title} cannot be imported ({'; '.join(problems)}); install it with `{flavour.install}`"
    )


def error_listener(trt: ModuleType, said: MutableSequence[str]) -> Any:
    """A logger that adds the library's errors to `said`. The library keeps no reference to it: the caller does."""

    class Listener(trt.ILogger):  # type: ignore[name-defined,misc]  # the module is known at run time alone
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(message)

    return Listener()


def quoted(said: Sequence[str]) -> str:
    """The library's last errors, to put behind a message."""
    return ": " + "; ".join(list(said)[-_SHOWN_ERRORS:]) if said else ""
