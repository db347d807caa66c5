"""A graph run piece by piece, so that the weights of one piece are in memory at a time.

An export proves its bundle by running it, and packed for fast products the weights of a large model take their
size once more. Here the nodes are cut, in their order, into pieces whose weights stay below a limit. A piece is a
graph of its own that reads its weights where they lie in the external data; it is loaded, packed and run as users
load, pack and run the whole, and dropped before the next one. Between pieces go the values that a later one reads.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from zreward.runtime.backends import Session, open_session

PIECE_BYTES = 256 << 20
"""Weights of a piece. A single matrix may be larger, and is then a piece with what belongs to it."""

_Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Piece:
    """Nodes that run together.

    Attributes:
        nodes: in their order.
        reads: values that come from outside: graph inputs, and results of earlier pieces.
        gives: results that a later piece or the caller reads.
        weights: names of the initializers.
    """

    nodes: Sequence[onnx.NodeProto]
    reads: Sequence[str]
    gives: Sequence[str]
    weights: Sequence[str]


class PiecewiseSession:
    """A session of the graph at `path` that holds one piece at a time.

    Args:
        path: an ONNX file with its external data beside it. While a piece is loaded, its graph lies there too.
        piece_bytes: of weights, see `PIECE_BYTES`.
        threads: see `open_session`.

    Raises:
        BackendError: the backend is not installed, or refuses the graph or a piece of it.
    """

    def __init__(self, path: Path, *, piece_bytes: int = PIECE_BYTES, threads: int | None = None) -> None:
        self._path, self._threads = path, threads
        self._model = onnx.load(path, load_external_data=False)
        self._initializers = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._values = {info.name: info for info in self._model.graph.value_info}
        self.inputs = frozenset(value.name for value in self._model.graph.input)
        self._pieces = cut(self._model.graph, piece_bytes)
        self._whole: Session | None = None
        if len(self._pieces) == 1:
            self._whole = open_session(path, provider="cpu", threads=threads)
        else:  # what joins the pieces is checked too
            open_session(path, provider="cpu", threads=threads, packed=False)

    def run(self, outputs: list[str], inputs: _Arrays) -> list[NDArray[Any]]:
        if self._whole is not None:
            return self._whole.run(outputs, inputs)
        values = dict(inputs)
        last_read = {name: i for i, piece in enumerate(self._pieces) for name in piece.reads}
        for index, piece in enumerate(self._pieces):
            later = [name for name in piece.gives if last_read.get(name, -1) > index or name in outputs]
            if later:
                results = self._run_piece(piece, later, {name: values[name] for name in piece.reads})
                values.update(zip(later, results, strict=True))
            for name in [n for n in values if last_read.get(n, -1) <= index and n not in outputs]:
                del values[name]
        return [values[name] for name in outputs]

    def _run_piece(self, piece: Piece, outputs: list[str], inputs: _Arrays) -> list[NDArray[Any]]:
        made = {name for node in piece.nodes for name in node.output}.difference(outputs)
        graph = onnx.helper.make_graph(
            piece.nodes,
            "piece",
            [_described(name, array) for name, array in inputs.items()],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [self._initializers[name] for name in piece.weights],
            # Shapes of what our own operators give are known from here alone, and fusions depend on them.
            value_info=[info for name in made if (info := self._values.get(name))],
        )
        model = onnx.ModelProto(ir_version=self._model.ir_version, graph=graph)
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        path = self._path.with_name(f"{self._path.name}.piece")
        try:
            path.write_bytes(model.SerializeToString())
            return open_session(path, provider="cpu", threads=self._threads).run(outputs, inputs)
        finally:
            path.unlink(missing_ok=True)
            _give_memory_back()


def cut(graph: onnx.GraphProto, piece_bytes: int) -> list[Piece]:
    """The nodes of `graph`, in their order, as pieces of at most `piece_bytes` of weights where that is possible.

    Nodes that compute from weights alone (scales that are cast, norms that get one added) are in every piece that
    reads them: a runtime folds them into constants, and products of quantized weights are packed only if their
    scales are constant. A cut is only made in front of a node that reads a matrix, so that a product stays with the
    bias and the activation that a runtime fuses with it.
    """
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    sizes = {tensor.name: _n_bytes(tensor) for tensor in graph.initializer}
    folded: dict[str, onnx.NodeProto] = {}
    groups: list[list[onnx.NodeProto]] = [[]]
    held: dict[str, int] = {}
    for node in graph.node:
        if all(name in sizes or name in folded for name in _read_by(node)):
            folded |= dict.fromkeys(node.output, node)
            continue
        weights = {name: sizes[name] for name in _with_sources(node, folded) if name in sizes}
        more = sum(size for name, size in weights.items() if name not in held)
        if more and matrices.intersection(weights) and groups[-1] and sum(held.values()) + more > piece_bytes:
            groups.append([])
            held = {}
        groups[-1].append(node)
        held |= weights
    wanted = {value.name for value in graph.output}
    pieces: list[Piece] = []
    for own in reversed(groups):
        nodes = [*_folded_for(own, folded), *own]
        made = {name for node in nodes for name in node.output if name}
        read = list(dict.fromkeys(name for node in nodes for name in _read_by(node)))
        outside = [name for name in read if name not in made and name not in sizes]
        gives = [name for node in own for name in node.output if name in wanted]
        pieces.append(Piece(nodes, outside, gives, [name for name in read if name in sizes]))
        wanted.update(outside)
    return pieces[::-1]


def _with_sources(node: onnx.NodeProto, folded: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """What a node reads, and what the folded nodes behind it read."""
    for name in _read_by(node):
        yield name
        if name in folded:
            yield from _with_sources(folded[name], folded)


def _folded_for(
    nodes: Sequence[onnx.NodeProto], folded: Mapping[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The folded nodes that `nodes` depend on, each after those that it reads."""
    found: dict[str, onnx.NodeProto] = {}

    def visit(node: onnx.NodeProto) -> None:
        for name in _read_by(node):
            if name in folded and folded[name].output[0] not in found:
                visit(folded[name])
                found[folded[name].output[0]] = folded[name]

    for node in nodes:
        visit(node)
    return list(found.values())


def _give_memory_back() -> None:
    """Have glibc return what was freed: packed weights leave gaps of gigabytes in its heap. Elsewhere, nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs take from around them included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for body in [attribute.g, *attribute.graphs]:
            own = {value.name for value in [*body.input, *body.initializer]}
            own.update(name for inner in body.node for name in inner.output)
            yield from (name for inner in body.node for name in _read_by(inner) if name not in own)
            yield from (value.name for value in body.output if value.name not in own)


def _n_bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.SerializeToString())


def _described(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)
