"""Which external-data files an ONNX graph reads, found without the onnx package.

A graph names its weight files in `TensorProto.external_data`. A bundle must not read outside its own
directory, and the runtime that checks it has no onnx. This walks along the fields of onnx.proto that lead to
tensors, and skips everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zreward.errors import BundleError
from zreward.protobuf import fields

# message -> {field number: message of that field}, from onnx/onnx.proto
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {},
}
_MAX_DEPTH = 64


def external_locations(path: Path) -> set[str]:
    """The `location` of every external tensor in the ONNX file at `path`.

    Raises:
        BundleError: the file is not readable or not a protobuf message.
    """
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return set(_locations(data, "Model", 0))
    except (IndexError, ValueError) as error:
        raise BundleError(f"{path}: not an ONNX file, or damaged ({error})") from None


def _locations(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs nested too deeply")
    children = _CHILDREN[message]
    entry: dict[int, str] = {}
    for number, value, _ in fields(data):
        if value is None:
            continue
        if message == "Entry":
            entry[number] = bytes(value).decode("utf-8")
        elif number in children:
            yield from _locations(value, children[number], depth + 1)
    if entry.get(1) == "location":
        yield entry.get(2, "")
