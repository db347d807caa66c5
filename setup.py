"""The kernels in runtime/kernels, a library that ONNX Runtime loads. Everything else stands in pyproject.toml.

They are optional: where no C++ compiler is found the package installs without them, and graphs run the bodies of their
functions.
"""

from __future__ import annotations

import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = (
    "attention",
    "delta_net",
    "library",
    "op",
    "peak",
    "quantized_linear",
    "quantized_product",
    "skip_norm",
)


class BuildLibrary(build_ext):
    """A plain shared library, not a Python module: it has no PyInit function to export."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ["RegisterCustomOps"]


kernels = Extension(
    "zreward.runtime.kernels._library",
    sources=[f"runtime/kernels/{name}.cpp" for name in SOURCES],
    depends=[
        f"runtime/kernels/{name}.h"
        for name in ("avx512", "kernels", "op", "ort_abi", "quantized_product", "vector_math")
    ],
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-g0", "-Wno-uninitialized"],
    language="c++",
    optional=True,
)

# They are written for x86-64, in the dialect of GCC and Clang.
has_kernels = sys.platform != "win32" and platform.machine().lower() in ("x86_64", "amd64")
setup(ext_modules=[kernels] if has_kernels else [], cmdclass={"build_ext": BuildLibrary})
