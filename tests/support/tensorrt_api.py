"""The real Python bindings of TensorRT without its libraries, for holding code against their interface.

`make bindings` installs them beside the packages of the environment; they are NVIDIA's, and not in the repository.
`bindings_environment` makes three libraries that have nothing but the symbols that the bindings ask for, so that these
can be imported. Nothing behind them works. `Checked` therefore stands in for their classes: it has the attributes of
the real class and no others, and a call must fit the signature that the real method documents. What a call returns is
an object of the class that the signature names, or an answer that the test gives.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

VERSIONS = ("10.16.1.11", "11.4.0.106")
"""Of the bindings; the Makefile names the same."""

on_linux_x86_64 = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="NVIDIA has these packages for Linux on x86-64",
)

_POINTERS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
)
_NUMBERS = ("getNvOnnxParserVersion", "initLibNvInferPlugins")
_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w*)\((.*)\) -> (.+)$")
_PLAIN = {
    "str": str,
    "bool": bool,
    "int": int,
    "typing.SupportsInt": int,
    "float": float,
    "list": list,
    "tuple": tuple,
    "typing_extensions.Buffer": (bytes, bytearray, memoryview),
}

Answers = Mapping[str, Any]


def bindings_environment(version: str, folder: Path) -> dict[str, str]:
    """Variables for a process that imports the bindings of one version as `tensorrt`, over stubs made in `folder`."""
    bindings = Path(sys.prefix) / f"tensorrt-{version}" / "tensorrt_bindings"
    assert bindings.is_dir(), f"the bindings of TensorRT {version} are missing; `make bindings` installs them"
    _compile_stubs(folder, version.split(".")[0])
    (folder / "tensorrt").symlink_to(bindings)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(paths)}


def _compile_stubs(folder: Path, major: str) -> None:
    """Libraries of the names that bindings of this major version load."""
    source = folder / "stubs.c"
    lines = [f"void *{name}(void) {{ return 0; }}" for name in _POINTERS]
    source.write_text("\n".join([*lines, *(f"int {name}(void) {{ return 0; }}" for name in _NUMBERS)]))
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)


class CheckedModule:
    """The module, with `Checked` in place of the classes that are called like functions."""

    def __init__(self, module: ModuleType, answers: Answers, *, starts: Sequence[str]) -> None:
        self._module, self._answers, self._starts, self.calls = module, answers, starts, list[str]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in self._starts:
            return found

        def construct(*arguments: Any, **keywords: Any) -> Checked:
            self.calls.append(name)
            _check_call(self._module, f"{name}.__init__", found.__init__.__doc__, arguments, keywords)
            return Checked(self, found)

        return construct


class Checked:
    """An object that has what instances of a class have."""

    def __init__(self, module: CheckedModule, cls: type, number: int | None = None) -> None:
        self.__dict__.update(_module=module, _class=cls, _number=number)

    def __getattr__(self, name: str) -> Any:
        module, where = self._module, f"{self._class.__name__}.{name}"
        attribute = getattr(self._class, name)
        if isinstance(attribute, property):
            return self._answer(where, _signatures(attribute.fget.__doc__)[0][1])

        def call(*arguments: Any, **keywords: Any) -> Any:
            module.calls.append(where)
            returned = _check_call(module._module, where, attribute.__doc__, arguments, keywords)
            return self._answer(where, returned, *arguments)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        attribute = getattr(self._class, name)
        assert isinstance(attribute, property) and attribute.fset, (
            f"{self._class.__name__}.{name} cannot be set"
        )
        ((_, expected, _),), _ = _signatures(attribute.fset.__doc__)[0]
        self._module.calls.append(f"{self._class.__name__}.{name}")
        assert _fits(self._module._module, value, expected), f"{name} takes {expected}, not {value!r}"

    def _answer(self, where: str, returned: str, *arguments: Any) -> Any:
        if where in self._module._answers:
            answer = self._module._answers[where]
            if not isinstance(answer, type):
                return answer(self._number, *arguments) if callable(answer) else answer
            cls = answer
        elif returned in ("None", "bool"):
            return None if returned == "None" else True
        else:
            cls = getattr(self._module._module, returned.rpartition(".")[2])
        number = arguments[0] if arguments and isinstance(arguments[0], int) else self._number
        return Checked(self._module, cls, number)


def _signatures(doc: str) -> list[tuple[list[tuple[str, str, bool]], str]]:
    """For each overload the parameters (name, type, required), without self, and the type that is returned."""
    found = []
    for line in doc.splitlines():
        match = _SIGNATURE.match(line.strip())
        if match is None or match[2].startswith("*args"):
            continue
        parameters = []
        for part in re.split(r", (?=\w+: )", match[2]):
            name, _, rest = part.partition(": ")
            kind, _, default = rest.partition(" = ")
            parameters.append((name, kind, not default))
        found.append((parameters[1:], match[3]))
    return found


def _check_call(
    module: ModuleType, where: str, doc: str, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> str:
    """What is returned by the first overload that takes these arguments."""
    signatures = _signatures(doc)
    assert signatures, f"{where} documents no signature: {doc!r}"
    for parameters, returned in signatures:
        names = [name for name, _, _ in parameters]
        given = {**dict(zip(names, arguments, strict=False)), **keywords}
        fits = len(arguments) <= len(names) and set(given) <= set(names)
        fits &= all(name in given for name, _, required in parameters if required)
        if fits and all(_fits(module, given[name], kind) for name, kind, _ in parameters if name in given):
            return returned
    raise AssertionError(f"{where} takes {signatures}, not {arguments} {keywords}")


def _fits(module: ModuleType, value: Any, kind: str) -> bool:
    if kind in _PLAIN:
        return isinstance(value, _PLAIN[kind])  # type: ignore[arg-type]  # a class, or a tuple of them
    name = kind.rpartition(".")[2]
    if name == "Dims":
        return isinstance(value, list | tuple) and all(type(size) is int for size in value)
    cls = getattr(module, name)
    return issubclass(value._class, cls) if isinstance(value, Checked) else isinstance(value, cls)
