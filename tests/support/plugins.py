"""The plugins as tests build them: on an emulated GPU, and the small host that uses a plugin library."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zreward.hashing import file_sha256
from zreward.plugins import OPERATORS, PluginRecord, write_record

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT.parent / "export" / "plugins"
EMULATOR = ROOT / "plugins" / "emulator"
STAND_IN = ROOT / "plugins" / "tensorrt_abi"

KERNELS = ("rubric_expectation.cu", "causal_conv1d.cu", "gated_delta_rule.cu")

# TensorRT's numbers of types; float32, float16, bfloat16, int32 are those of tensors, the others those of attributes.
FLOAT, HALF, INT32, BF16 = 0, 1, 3, 7
FIELD_FLOAT32, FIELD_FLOAT64, FIELD_INT32, FIELD_CHAR, FIELD_INT64 = 1, 2, 5, 6, 10

_FIELD_TYPES = {
    FIELD_FLOAT32: "<f4",
    FIELD_FLOAT64: "<f8",
    FIELD_INT32: "<i4",
    FIELD_INT64: "<i8",
    FIELD_CHAR: "S1",
}


def recorded_library(path: Path, tensorrt: str) -> PluginRecord:
    """A file that is no library, and beside it the record of one that was built for this version of TensorRT."""
    path.write_bytes(b"plugins for " + tensorrt.encode())
    sha256, n_bytes = file_sha256(path), path.stat().st_size
    record = PluginRecord(sha256, n_bytes, "0", 1, "13.0", ("8.0",), tensorrt, OPERATORS)
    write_record(path, record)
    return record


def tensorrt_include() -> Path:
    """NVIDIA's headers where ZREWARD_TENSORRT_INCLUDE names them, else the declarations beside the tests."""
    return Path(os.environ.get("ZREWARD_TENSORRT_INCLUDE") or STAND_IN)


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills, for all processes of a test run."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with _locked(base / f"{name}.lock"):
        if not folder.exists():
            partial = base / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_emulated(folder: Path) -> None:
    """libkernels.so, libplugins.so and libhost.so: kernels on the emulated GPU, plugins on those, and the host."""
    includes = [f"-I{SOURCES / 'kernels'}", f"-I{EMULATOR}", "-isystem", str(tensorrt_include())]
    # NVIDIA's headers mark what is old, and this compiler marks the kernels' pragmas for another one.
    flags = [
        "-std=c++17",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-deprecated-declarations",
    ]
    # Fibers leave their stacks by longjmp, which fortified libraries take for an error.
    flags += ["-DZREWARD_EMULATE", "-U_FORTIFY_SOURCE", *includes]

    def compile(source: Path, *more: str) -> str:
        target = folder / f"{source.name}.o"
        run(["g++", *flags, *more, "-c", str(source), "-o", str(target)])
        return str(target)

    kernels = [compile(SOURCES / "kernels" / name, "-O1", "-x", "c++") for name in KERNELS]
    kernels += [compile(SOURCES / "kernels" / "checks.cpp", "-O1"), compile(EMULATOR / "emulator.cpp", "-O2")]
    kernels.append(compile(ROOT / "plugins" / "quick_head_host.cpp", "-O1"))
    plugins = [compile(path, "-O1") for path in sorted((SOURCES / "tensorrt").glob("*.cpp"))]
    host = compile(ROOT / "plugins" / "mini_host.cpp", "-O1")
    for name, objects in (("kernels", kernels), ("plugins", kernels + plugins), ("host", [host])):
        run(["g++", "-shared", *objects, "-ldl", "-o", str(folder / f"lib{name}.so")])


def run(command: Sequence[str]) -> str:
    """Standard output; a failure shows what the command said."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


Field = tuple[str, int, Any]
"""Name, TensorRT's number of the type, and a value or several."""


@dataclass(frozen=True)
class Creator:
    index: int
    name: str
    version: str
    namespace: str
    attributes: Mapping[str, int]


class RefusedError(Exception):
    """The plugin refused; the text is what it logged."""


class Host:
    """The C++ host, with one plugin library loaded."""

    def __init__(self, host: Path, library: Path) -> None:
        # A copy for each library: the loader would hand out one host, and its creators, for all.
        copy = host.with_name(f"libhost-{library.stem}-{os.getpid()}.so")
        shutil.copyfile(host, copy)
        self.c = ctypes.CDLL(str(copy))
        for name in ("host_messages", "host_creator", "host_name", "host_serialize", "host_output_shapes"):
            getattr(self.c, name).restype = ctypes.c_char_p
        for name in ("host_create", "host_clone", "host_attach"):
            getattr(self.c, name).restype = ctypes.c_void_p
        self.c.host_workspace.restype = ctypes.c_int64
        count = self.c.host_load(str(library).encode())
        assert count >= 0, (count, self.messages())
        self.creators = [self._creator(index) for index in range(count)]

    def messages(self) -> str:
        found = self.c.host_messages()
        assert isinstance(found, bytes)
        return found.decode()

    def _creator(self, index: int) -> Creator:
        name, version, namespace, *attributes = self.c.host_creator(index).decode().split()
        pairs = (attribute.split(":") for attribute in attributes)
        return Creator(index, name, version, namespace, {key: int(kind) for key, kind in pairs})

    def create(self, operator: str, fields: Sequence[Field], *, phase: int = 0) -> Plugin:
        """A plugin of attributes, as from a model (phase 0) or from an engine (phase 1).

        Raises:
            RefusedError: with what the creator logged.
        """
        index = next(creator.index for creator in self.creators if creator.name == operator)
        values = [np.atleast_1d(np.asarray(value, _FIELD_TYPES[kind])) for _, kind, value in fields]
        count = len(fields)
        made = self.c.host_create(
            index,
            phase,
            count,
            (ctypes.c_char_p * count)(*(name.encode() for name, _, _ in fields)),
            (ctypes.c_int32 * count)(*(kind for _, kind, _ in fields)),
            (ctypes.c_int32 * count)(*(len(value) for value in values)),
            (ctypes.c_void_p * count)(*(value.ctypes.data for value in values)),
        )
        if not made:
            raise RefusedError(self.messages())
        return Plugin(self, made)


class Plugin:
    """One plugin; shapes have −1 for what is not known."""

    def __init__(self, host: Host, pointer: int) -> None:
        self.host = host
        self.pointer = ctypes.c_void_p(pointer)

    def close(self) -> None:
        self.host.c.host_destroy(self.pointer)

    def clone(self) -> Plugin:
        return Plugin(self.host, self.host.c.host_clone(self.pointer))

    def attach(self) -> Plugin:
        return Plugin(self.host, self.host.c.host_attach(self.pointer))

    def name(self) -> str:
        return str(self.host.c.host_name(self.pointer).decode())

    def serialize(self) -> list[Field]:
        """The fields that an engine keeps."""
        fields: list[Field] = []
        for line in self.host.c.host_serialize(self.pointer).decode().splitlines():
            name, kind, length, data = line.split()
            value = np.frombuffer(bytes.fromhex(data), _FIELD_TYPES[int(kind)])
            assert len(value) == int(length)
            fields.append((name, int(kind), value.item() if len(value) == 1 else value.tolist()))
        return fields

    def output_shapes(self, shapes: Sequence[Sequence[int]]) -> list[list[str]]:
        """Shapes of the outputs, unknown sizes by the letter of the input axis that they are: a for the first."""
        found = self.host.c.host_output_shapes(self.pointer, len(shapes), *_shapes(shapes))
        if found is None:
            raise RefusedError(self.host.messages())
        return [shape.split(",") for shape in found.decode().split(";")]

    def output_types(self, types: Sequence[int]) -> list[int]:
        outputs = (ctypes.c_int32 * 8)()
        count = self.host.c.host_output_types(self.pointer, len(types), _int32s(types), outputs)
        if count < 0:
            raise RefusedError(self.host.messages())
        return list(outputs[:count])

    def supports(self, position: int, types: Sequence[int], n_inputs: int, *, format: int = 0) -> bool:
        """Whether tensor `position` may have its type, where `types` are those of all inputs and outputs."""
        answer = self.host.c.host_supports(
            self.pointer, position, n_inputs, len(types) - n_inputs, _int32s(types), format
        )
        return bool(answer)

    def configure(self, types: Sequence[int], shapes: Sequence[Sequence[int]]) -> None:
        if self.host.c.host_configure(self.pointer, len(shapes), _int32s(types), *_shapes(shapes)):
            raise RefusedError(self.host.messages())

    def workspace(self, types: Sequence[int], shapes: Sequence[Sequence[int]]) -> int:
        """Bytes for inputs of at most these shapes."""
        return int(self.host.c.host_workspace(self.pointer, len(shapes), _int32s(types), *_shapes(shapes)))

    def run(
        self,
        types: Sequence[int],
        inputs: Sequence[NDArray[Any]],
        outputs: Sequence[NDArray[Any]],
        workspace: NDArray[Any] | None = None,
    ) -> None:
        """Shape change and enqueue on the CPU's memory: for libraries on emulated kernels."""
        pointers = [
            (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)) for arrays in (inputs, outputs)
        ]
        status = self.host.c.host_run(
            self.pointer,
            len(inputs),
            _int32s(types),
            *_shapes([array.shape for array in inputs]),
            *pointers,
            ctypes.c_void_p(workspace.ctypes.data if workspace is not None else None),
        )
        if status:
            raise RefusedError(self.host.messages())


def _int32s(values: Sequence[int]) -> Any:
    return (ctypes.c_int32 * len(values))(*values)


def _shapes(shapes: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Ranks, and all sizes in a row."""
    sizes = [size for shape in shapes for size in shape]
    return _int32s([len(shape) for shape in shapes]), (ctypes.c_int64 * len(sizes))(*sizes)
