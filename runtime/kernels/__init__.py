"""Kernels for ONNX Runtime, compiled with the package where a C++ compiler is at hand.

Graphs of the target `cpu` contain operators of the domain zreward (Int8Linear, GatedDeltaNet, …) with bodies in ONNX
Runtime's own operators. A session that registers this library runs its kernels instead, on processors with AVX-512
VNNI; elsewhere, and without the library, the bodies run. Scores agree up to the rounding of sums.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

DISABLE = "ZREWARD_NO_KERNELS"
"""Environment variable: where it is set to anything, the library is not used."""


def compiled_library() -> Path | None:
    """The compiled library, or None where there is none or `DISABLE` is set."""
    return None if os.environ.get(DISABLE) else _found()


@cache
def _found() -> Path | None:
    folder = Path(__file__).parent
    candidates = (folder / f"_library{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)
