"""From a checkpoint to a bundle: ONNX graphs with the fused rubric head, written as they stream.

The names of the main path are imported when they are asked for: building an engine (`zreward.export.tensorrt`) needs
neither onnx nor a runtime that proves bundles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zreward.export.build import ExportOptions, export_bundle

__all__ = ["ExportOptions", "export_bundle"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from zreward.export import build

    return getattr(build, name)
