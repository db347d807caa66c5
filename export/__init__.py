"""From a checkpoint to a bundle: ONNX graphs with the fused rubric head, written as they stream."""

from __future__ import annotations

from zreward.export.build import ExportOptions, export_bundle

__all__ = ["ExportOptions", "export_bundle"]
