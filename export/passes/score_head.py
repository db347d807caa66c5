"""The score head: last real position, the rows of the codes, and the rubric expectation in the graph.

The decoder of mobius ends in a final norm and a product with the whole vocabulary at every position. A
reward needs one position and as many rows as there are bins. This pass reads each row's last real
position before the norm, and replaces norm and product by one node:

    zreward::RubricExpectation(hidden [B, H], norm_weight [H], score_rows [n, H], temperature [B],
                               bins [n]; epsilon) -> probs [B, n], mean [B], variance [B]

The node is a local function of standard ops, so every runtime can execute it; `plugin_namespace` and
`plugin_version` let TensorRT prefer a plugin of that name where one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from zreward.errors import ExportError
from zreward.export.irtools import DOMAIN, add_function, add_initializer, input_of, integers, producer_of
from zreward.export.weights import CheckpointTensor

RUBRIC_EXPECTATION = "RubricExpectation"
LABEL_MASS = "LabelMass"


def fuse_score_head(
    model: ir.Model, code_ids: Sequence[int], bins: Sequence[float], *, label_mass: bool = False
) -> int:
    """Replace the decoder's `logits` by `probs`, `mean`, `variance` and, if asked for, `label_mass`.

    Adds the inputs `last_index` (int64 [B], each row's last real position) and `temperature`
    (float32 [B]). Label mass (float32 [B]) is the share of the whole vocabulary's probability that the
    codes hold, at temperature one; it keeps the full head in the graph.
    """
    graph = model.graph
    logits = next((v for v in graph.outputs if v.name == "logits"), None)
    if logits is None:
        raise ExportError("score head: the decoder has no output 'logits'")
    product = producer_of(logits, "MatMul")
    norm = producer_of(input_of(product, 0), "SkipSimplifiedLayerNormalization")
    skip, branch, norm_weight = (input_of(norm, index) for index in range(3))
    head = input_of(producer_of(input_of(product, 1), "Transpose"), 0).const_value
    if not isinstance(head, CheckpointTensor):
        raise ExportError("score head: the language head is not a weight of the checkpoint")
    n_rows = head.shape.numpy()[0]
    if max(code_ids) >= n_rows:
        raise ExportError(f"score head: code ids {list(code_ids)} lie outside the head's {n_rows} rows")

    last_index = _input("last_index", ir.DataType.INT64)
    temperature = _input("temperature", ir.DataType.FLOAT)
    graph.inputs.extend([last_index, temperature])
    rows = add_initializer(graph, head.with_layout("zreward.score_rows", rows=tuple(code_ids)))
    bin_values = add_initializer(graph, ir.tensor(np.array(bins, dtype=np.float32), name="zreward.bins"))

    builder = tape.Tape()
    index = builder.op("Unsqueeze", [last_index, integers(builder, 1)])
    hidden = builder.op(
        "Add",
        [builder.op("GatherND", [value, index], attributes={"batch_dims": 1}) for value in (skip, branch)],
    )
    epsilon = norm.attributes["epsilon"].as_float()
    outputs = builder.op_multi_out(
        RUBRIC_EXPECTATION,
        [hidden, norm_weight, rows, temperature, bin_values],
        attributes={"epsilon": epsilon, "plugin_namespace": DOMAIN, "plugin_version": "1"},
        domain=DOMAIN,
        num_outputs=3,
    )
    named = list(zip(("probs", "mean", "variance"), outputs, strict=True))
    opset = model.graph.opset_imports[""]  # a function's opset must equal its model's
    functions = [_rubric_expectation(opset)]
    if label_mass:
        vocabulary = add_initializer(graph, head.with_layout("zreward.vocabulary_rows"))
        mass = builder.op(
            LABEL_MASS,
            [hidden, norm_weight, rows, vocabulary],
            attributes={"epsilon": epsilon},
            domain=DOMAIN,
        )
        named.append(("label_mass", mass))
        functions.append(_label_mass(opset))

    for name, value in named:
        value.name = name
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(["batch", len(bins)] if name == "probs" else ["batch"])
    graph.extend(builder.nodes)
    graph.outputs[:] = [value for _, value in named] + [v for v in graph.outputs if v is not logits]
    for function in functions:
        add_function(model, function)
    return 1


def _input(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch"]), type=ir.TensorType(dtype))


def _normed(builder: tape.Tape, hidden: ir.Value, weight: ir.Value) -> ir.Value:
    """RMS norm in float32 with the function's `epsilon`; the weight already holds Qwen's offset of one."""
    x = builder.op("Cast", [hidden], attributes={"to": ir.DataType.FLOAT})
    axis = integers(builder, -1)
    power = builder.op("ReduceMean", [builder.op("Mul", [x, x]), axis], attributes={"keepdims": 1})
    reference = ir.RefAttr("value_float", "epsilon", ir.AttributeType.FLOAT)
    epsilon = builder.op("Constant", [], attributes={"value_float": reference})
    root = builder.op("Sqrt", [builder.op("Add", [power, epsilon])])
    scale = builder.op("Cast", [weight], attributes={"to": ir.DataType.FLOAT})
    return builder.op("Mul", [builder.op("Div", [x, root]), scale])


def _row_logits(builder: tape.Tape, normed: ir.Value, rows: ir.Value) -> ir.Value:
    matrix = builder.op("Cast", [rows], attributes={"to": ir.DataType.FLOAT})
    return builder.op("Gemm", [normed, matrix], attributes={"transB": 1})


def _rubric_expectation(opset: int) -> ir.Function:
    """The body: RMS norm, row logits, temperature softmax, Σ s·q(s) and Σ (s − μ)²·q(s), in float32."""
    hidden, weight, rows, temperature, bins = (
        ir.Value(name=name) for name in ("hidden", "norm_weight", "score_rows", "temperature", "bins")
    )
    builder = tape.Tape()
    logits = _row_logits(builder, _normed(builder, hidden, weight), rows)
    column = integers(builder, 1)
    scaled = builder.op("Div", [logits, builder.op("Unsqueeze", [temperature, column])])
    probs = builder.op("Softmax", [scaled], attributes={"axis": -1})
    mean = builder.op("ReduceSum", [builder.op("Mul", [probs, bins]), column], attributes={"keepdims": 0})
    deviation = builder.op("Sub", [bins, builder.op("Unsqueeze", [mean, column])])
    squares = builder.op("Mul", [builder.op("Mul", [deviation, deviation]), probs])
    variance = builder.op("ReduceSum", [squares, column], attributes={"keepdims": 0})
    return _function(
        RUBRIC_EXPECTATION, opset, [hidden, weight, rows, temperature, bins], [probs, mean, variance], builder
    )


def _label_mass(opset: int) -> ir.Function:
    """The body: Σ over the codes of exp(logit), over the same sum for the whole vocabulary."""
    hidden, weight, rows, vocabulary = (
        ir.Value(name=name) for name in ("hidden", "norm_weight", "score_rows", "vocabulary_rows")
    )
    builder = tape.Tape()
    normed = _normed(builder, hidden, weight)
    axis = integers(builder, 1)
    log_sums = [
        builder.op(
            "ReduceLogSumExp", [_row_logits(builder, normed, matrix), axis], attributes={"keepdims": 0}
        )
        for matrix in (rows, vocabulary)
    ]
    # Rounding alone can exceed one: the vocabulary may be stored in 16 bits, the code rows never are.
    one = builder.op("Constant", [], attributes={"value_float": 1.0})
    mass = builder.op("Min", [builder.op("Exp", [builder.op("Sub", log_sums)]), one])
    return _function(LABEL_MASS, opset, [hidden, weight, rows, vocabulary], [mass], builder)


def _function(
    name: str, opset: int, inputs: list[ir.Value], outputs: list[ir.Value], builder: tape.Tape
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, opset_imports={"": opset}, name=name)
    epsilon = ir.AttrFloat32("epsilon", 1e-6)
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[epsilon])
