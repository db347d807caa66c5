"""Targets: what each runtime wants of the graphs, as a list of passes. One target a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from zreward.export.targets.cpu import lower_to_cpu
from zreward.export.targets.cuda import lower_to_cuda
from zreward.export.targets.portable import lower_to_portable
from zreward.export.targets.tensorrt import lower_to_tensorrt

LOWERINGS: Mapping[str, Callable[..., None]] = {
    "cpu": lower_to_cpu,
    "cuda": lower_to_cuda,
    "onnx": lower_to_portable,
    "tensorrt": lower_to_tensorrt,
}
"""By the name of the target; all take the arguments of `lower_to_portable`."""
