"""Builds the plugin library with CMake, and writes the record that `zreward.plugins` compares it with."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zreward import __version__
from zreward.errors import PluginError, UsageError
from zreward.export.plugins.toolchain import Toolchain, find_toolchain
from zreward.hashing import file_sha256
from zreward.plugins import (
    KERNELS_FILE,
    LIBRARY_FILE,
    PluginLibrary,
    PluginRecord,
    described,
    write_record,
)

SOURCES = Path(__file__).resolve().parent

ARCHITECTURES = (80, 90, 120)
"""Compute capabilities, times ten. GPUs between them run the code of the one below, or compile the oldest again."""

_LINES_OF_AN_ERROR = 30


def build_plugins(
    output: Path,
    *,
    nvcc: Path | None = None,
    tensorrt: Path | None = None,
    architectures: Sequence[int] = ARCHITECTURES,
    kernels_only: bool = False,
    warnings_are_errors: bool = False,
) -> PluginLibrary:
    """Compile the library into the folder `output`, with its record beside it.

    What was there under the same names is replaced when the new library is complete.

    Args:
        output: a folder; it is made where it does not exist.
        nvcc, tensorrt: see `find_toolchain`.
        architectures: compute capabilities times ten, at least 80.
        kernels_only: builds `libzreward_kernels.so`, which needs no TensorRT.

    Raises:
        UsageError: an architecture that the kernels do not compile for, or an output that is no folder.
        PluginError: a tool is missing, or the compilation failed; the message ends with what the compiler said.
    """
    if not architectures or min(architectures) < 80:
        raise UsageError(
            f"architectures are {', '.join(map(str, architectures)) or 'none'}; the kernels need compute capability "
            "8.0 (given as 80) or more"
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; name the folder that the library is put in")
    tools = find_toolchain(nvcc=nvcc, tensorrt=tensorrt, kernels_only=kernels_only)
    name = KERNELS_FILE if kernels_only else LIBRARY_FILE
    ascending = sorted(set(architectures))
    with tempfile.TemporaryDirectory(prefix="zreward-plugins-") as folder:
        built = _compile(tools, Path(folder), name, ascending, warnings_are_errors)
        description = described(built)
        record = PluginRecord(
            sha256=file_sha256(built),
            bytes=built.stat().st_size,
            zreward=__version__,
            kernels=description["kernels"],
            cuda=tools.cuda,
            architectures=tuple(f"{a // 10}.{a % 10}" for a in ascending),
            tensorrt=description["tensorrt"],
            plugins=tuple(plugin["name"] for plugin in description["plugins"]),
        )
        library = output.absolute() / name
        _put(built, library, record)
    return PluginLibrary.open(library)


def _compile(
    tools: Toolchain, folder: Path, name: str, architectures: Sequence[int], warnings_are_errors: bool
) -> Path:
    options = {
        "ZREWARD_NVCC": str(tools.nvcc.resolve()),
        "ZREWARD_CUDA_ARCHITECTURES": ";".join(map(str, architectures)),
        "ZREWARD_TENSORRT_INCLUDE": str(tools.tensorrt_include or ""),
        "ZREWARD_WARNINGS_ARE_ERRORS": "ON" if warnings_are_errors else "OFF",
    }
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    _run([str(tools.cmake), "-S", str(SOURCES), "-B", str(folder), *definitions])
    target = Path(name).stem.removeprefix("lib")
    jobs = str(min(4, os.cpu_count() or 1))
    _run([str(tools.cmake), "--build", str(folder), "--target", target, "--parallel", jobs])
    return folder / name


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode:
        said = "\n".join(_telling(result.stdout))
        raise PluginError(f"the plugins could not be built; `{' '.join(command)}` says:\n{said}")


def _telling(output: str) -> list[str]:
    """From the first line that speaks of an error: what follows is often about what that one broke."""
    lines = [line for line in output.splitlines() if line.strip()]
    first = next(
        (i for i, line in enumerate(lines) if "error" in line.lower()), len(lines) - _LINES_OF_AN_ERROR
    )
    return lines[max(0, first) :][:_LINES_OF_AN_ERROR]


def _put(built: Path, library: Path, record: PluginRecord) -> None:
    """Copy beside the final name and rename: a process that has the earlier library open keeps it."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        staged = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(built, staged)
        staged.chmod(0o755)
        staged.replace(library)
        write_record(library, record)
    except OSError as error:
        raise UsageError(f"{library}: cannot be written here ({error.strerror})") from None
