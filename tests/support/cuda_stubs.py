"""Libraries of CUDA that stand for a GPU, so that the real onnxruntime-gpu makes and runs sessions without one.

The wheel says which functions it asks for. Those that decide something are in cuda_runtime.cpp; the others succeed and
do nothing. There is no cuDNN, as on a machine where the `gpu` extra is all that is installed. `make` puts the wheel
beside the packages of its environment, because it has the files of the build for CPUs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zreward.export.plugins.toolchain import find_nvcc

VERSION = "1.31.1"
ROOT = Path(__file__).resolve().parent.parent.parent
WHEEL = Path(sys.prefix) / f"onnxruntime-gpu-{VERSION}"
PROVIDER = WHEEL / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so"

needs_wheel = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the libraries are made for Linux on x86-64",
)

_SOURCE = Path(__file__).with_name("cuda_runtime.cpp")
_RUNTIME, _DRIVER, _BLAS = "libcudart.so.13", "libcuda.so.1", ("libcublas.so.13", "libcublasLt.so.13")
_MAKERS = ("Create", "Create_v2")
_TEXTS = ("cublasGetStatusName", "cublasGetStatusString")
_FOUND_ONE = "cublasLtMatmulAlgoGetHeuristic"


def compile_cuda(folder: Path) -> None:
    """Make the libraries in `folder`, which LD_LIBRARY_PATH then names."""
    assert PROVIDER.is_file(), f"onnxruntime-gpu {VERSION} is not installed; `make bindings` installs it"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(PROVIDER)], capture_output=True, text=True, check=True
    ).stdout.split()
    written = _SOURCE.read_text()
    functions = folder / "functions.o"
    host = ["-x", "c++", "-Xcompiler", "-fPIC", "-c", "-o", str(functions), str(_SOURCE)]
    subprocess.run([str(find_nvcc()), *host], check=True)  # which knows where CUDA's headers are
    for library in (_RUNTIME, _DRIVER, *_BLAS, "libcurand.so.10"):
        asked = [s.partition("@")[0] for s in symbols if s.endswith(f"@{library}")]
        if library == _DRIVER:
            asked = [s for s in symbols if s.startswith("cuTensorMap")]
        own = library in (_RUNTIME, _DRIVER)
        filler = folder / f"{library}.c"
        filler.write_text(
            "\n".join(_definition(name) for name in asked if not (own and f" {name}(" in written))
        )
        version = folder / f"{library}.map"
        version.write_text(f"{library} {{ global: *; }};\n")
        command = [
            "c++",
            "-shared",
            "-fPIC",
            "-w",
            f"-Wl,-soname,{library}",
            f"-Wl,--version-script={version}",
        ]
        command += ["-o", str(folder / library), *([str(functions)] if own else []), "-x", "c", str(filler)]
        subprocess.run(command, check=True)


def cuda_child(stubs: Path | None, *arguments: str | Path, **settings: str) -> Any:
    """What a function of tests/runtime/cuda_child.py gives in a process with the wheel.

    Args:
        stubs: folder of the libraries; None: the process has no CUDA.
        arguments: the function's name, and what it takes.
        settings: more of its environment.
    """
    libraries = {"LD_LIBRARY_PATH": str(stubs)} if stubs is not None else {}
    paths = os.pathsep.join([str(WHEEL), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.cuda_child", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **libraries, **settings, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _definition(name: str) -> str:
    if name in _TEXTS:
        return f'const char *{name}(void) {{ return "stub"; }}'
    if name == _FOUND_ONE:
        last = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int h, void *i, int *found"
        return f"int {name}({last}) {{ *found = 1; return 0; }}"
    if name.endswith(_MAKERS):
        return (
            f"static char handle_{name}[64]; int {name}(void **made) {{ *made = handle_{name}; return 0; }}"
        )
    return f"long {name}(void) {{ return 0; }}"
