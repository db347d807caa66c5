"""Engines of TensorRT and TensorRT-RTX, built from the graphs of a bundle and put into its directory.

`build_engine` is the whole of it: sizes from the contract (`profiles`), a process for each graph (`worker`), and there
the library itself (`builder`). `zreward.engines` has what is written, for the runtime to read.
"""

from zreward.export.tensorrt.build import EngineOptions, build_engine
from zreward.export.tensorrt.profiles import profiles

__all__ = ["EngineOptions", "build_engine", "profiles"]
