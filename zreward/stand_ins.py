"""Operators that one runtime has and another has not, with the local function that stands in for each.

A graph for ONNX Runtime's CUDA provider names operators that CPUs have no kernel for. It also brings, as local
functions that no node names, what computes the same anywhere. On a CPU the nodes are renamed while the graph is
loaded, so that one file runs on both: at the end of an export, which proves it, in `zreward verify`, and in a test.
"""

from __future__ import annotations

from collections.abc import Mapping

from zreward.onnx_names import Name, with_names

STAND_INS: Mapping[Name, Name] = {("com.microsoft", "GatedDeltaNet"): ("zreward", "PackedDeltaNet")}
"""The operator, and the function that stands in for it."""


def needs_stand_ins(model: bytes) -> bool:
    """Whether a serialized model brings a stand-in."""
    return any(name.encode() in model for _, name in STAND_INS.values())


def with_stand_ins(model: bytes) -> bytes:
    """The serialized model with every node of the main graph that has a stand-in renamed to it.

    Raises:
        BundleError: it is not a model.
    """
    return with_names(model, STAND_INS, {})
