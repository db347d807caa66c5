"""A graph run piece by piece gives what it gives as a whole, and holds one piece at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zreward.bundle import Bundle
from zreward.errors import BackendError
from zreward.export.pieces import PiecewiseSession, cut
from zreward.golden import golden_inputs
from zreward.image import preprocess
from zreward.runtime.engine import Engine


@pytest.mark.parametrize("piece_bytes", [1, 20_000, 100_000])
def test_pieces_answer_as_the_whole_does(tiny_bundle: Path, piece_bytes: int) -> None:
    bundle = Bundle.open(tiny_bundle)

    def opened(path: Path) -> PiecewiseSession:
        return PiecewiseSession(path, piece_bytes=piece_bytes, threads=1)

    whole = Engine(bundle, threads=1)
    pieces = Engine(bundle, open_graph=opened)
    prompt, picture = next(golden_inputs(bundle.contract.image))
    patches = preprocess(picture, bundle.contract.image)
    answers = []
    for engine in (whole, pieces):
        state = engine.prompt_state(prompt)
        state = engine.image_state(state, [engine.encode_image(patches)] * 2, patches.token_grid)
        answers.append(engine.answer(state).probs)
    np.testing.assert_array_equal(answers[1], answers[0])
    assert not list(tiny_bundle.glob("*.piece"))


def test_pieces_stay_below_the_limit_and_cover_every_node(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    sizes = {
        t.name: int(next(e.value for e in t.external_data if e.key == "length")) if t.external_data else 0
        for t in graph.initializer
    }
    limit = 2 * max(sizes.values())
    pieces = cut(graph, limit)
    assert len(pieces) > 3
    names = [node.name for piece in pieces for node in piece.nodes]
    times = Counter(names)
    assert set(times) == {node.name for node in graph.node}
    constant = {node.name for node in graph.node if is_constant(graph, node)}
    assert constant
    assert all(count == 1 for name, count in times.items() if name not in constant)
    assert all(sum(sizes[name] for name in piece.weights) <= limit * 1.5 for piece in pieces)
    made = {value.name for value in graph.input}
    for piece in pieces:
        assert made.issuperset(piece.reads)
        made.update(piece.gives)
    assert made.issuperset(value.name for value in graph.output)


def is_constant(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether a node depends on no input of the graph."""
    made = {name: other for other in graph.node for name in other.output}
    inputs = {value.name for value in graph.input}
    return all(
        name not in inputs and (name not in made or is_constant(graph, made[name])) for name in node.input
    )


def test_values_that_only_a_subgraph_reads_reach_it(tmp_path: Path) -> None:
    """The branches of an If read the first piece's result, and neither is an input of the node."""
    weight = numpy_helper.from_array(np.full((2, 2), 2, np.float32), "w")
    branches = [
        helper.make_graph(
            [helper.make_node(op, ["hidden", "w"], [f"{op}.y"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}.y", TensorProto.FLOAT, None)],
        )
        for op in ("Add", "Mul")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["hidden"]),
        helper.make_node("MatMul", ["x", "v"], ["other"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    other = numpy_helper.from_array(np.eye(2, dtype=np.float32), "v")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("y", "other")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight, other])
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    session = PiecewiseSession(path, piece_bytes=1)
    x = np.eye(2, dtype=np.float32)
    y, given = session.run(["y", "other"], {"x": x, "flag": np.array(False)})
    np.testing.assert_array_equal(y, np.full((2, 2), 4))
    np.testing.assert_array_equal(given, x)


def test_a_graph_that_does_not_load_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "decoder.onnx"
    broken.write_bytes((tiny_bundle / "decoder.onnx").read_bytes())  # without its external data
    with pytest.raises(BackendError, match="refuses this graph"):
        PiecewiseSession(broken, piece_bytes=1)
