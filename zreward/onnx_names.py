"""Renaming operators of an ONNX file while it is loaded, without the onnx package.

Which runtime knows an operator is told by its domain and name alone. The file of a bundle has the names that its target
knows; where it runs on another one, nodes get the names of what that one has.
"""

from __future__ import annotations

from collections.abc import Mapping

from zreward.errors import BundleError
from zreward.protobuf import encoded, fields

Name = tuple[str, str]
"""Domain and operator type."""

# Field numbers of onnx.proto.
_GRAPH, _OPSET_IMPORT = 7, 8  # in ModelProto
_NODE = 1  # in GraphProto
_OP_TYPE, _DOMAIN = 4, 7  # in NodeProto
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2  # in OperatorSetIdProto


def with_names(model: bytes, names: Mapping[Name, Name], opsets: Mapping[str, int]) -> bytes:
    """A serialized model with the nodes of its main graph renamed.

    Args:
        model: of any size; its weights may lie elsewhere.
        names: new name by old name.
        opsets: domains that the model does not import yet, with their versions, below 128.

    Raises:
        BundleError: it is not a model.
    """
    try:
        parts: list[bytes | memoryview] = [
            encoded(_GRAPH, _renamed_graph(content, names))
            if number == _GRAPH and content is not None
            else raw
            for number, content, raw in fields(memoryview(model))
        ]
    except (IndexError, ValueError) as error:
        raise BundleError(f"not an ONNX file, or damaged ({error})") from None
    for domain, version in opsets.items():
        imported = encoded(_OPSET_DOMAIN, domain.encode()) + bytes([_OPSET_VERSION << 3, version])
        parts.append(encoded(_OPSET_IMPORT, imported))
    return b"".join(parts)


def _renamed_graph(graph: memoryview, names: Mapping[Name, Name]) -> bytes:
    return b"".join(
        _renamed_node(content, raw, names) if number == _NODE and content is not None else raw
        for number, content, raw in fields(graph)
    )


def _renamed_node(node: memoryview, raw: memoryview, names: Mapping[Name, Name]) -> bytes | memoryview:
    found = {number: bytes(content or b"") for number, content, _ in fields(node)}
    name = found.get(_DOMAIN, b"").decode(), found.get(_OP_TYPE, b"").decode()
    if name not in names:
        return raw
    domain, op_type = names[name]
    kept = [field.raw for field in fields(node) if field.number not in (_OP_TYPE, _DOMAIN)]
    return encoded(
        _NODE, b"".join([*kept, encoded(_OP_TYPE, op_type.encode()), encoded(_DOMAIN, domain.encode())])
    )
