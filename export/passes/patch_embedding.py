"""The patch embedding as a matrix product.

A convolution whose kernel covers the whole patch, and whose stride is the kernel, is a linear layer on
flattened patches; the runtime sends them flattened already. Matrix products are the fast path everywhere.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import convenience, tape

from zreward.errors import ExportError
from zreward.export.irtools import add_initializer, input_of, producer_of
from zreward.export.weights import CheckpointTensor


def lower_patch_embedding(model: ir.Model) -> int:
    """Replace Reshape → Conv → Reshape on `pixel_values` [patches, K] by MatMul and Add."""
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    if len(convolutions) != 1:
        raise ExportError(
            f"patch embedding: expected one Conv in the vision tower, found {len(convolutions)}"
        )
    conv = convolutions[0]
    kernel, bias = input_of(conv, 1), input_of(conv, 2)
    pixels = input_of(producer_of(input_of(conv, 0), "Reshape"), 0)
    consumer = next(iter(conv.outputs[0].consumers()), None)
    if pixels.name != "pixel_values" or consumer is None or consumer.op_type != "Reshape":
        raise ExportError("patch embedding: the Conv is not between two Reshapes of 'pixel_values'")
    if not isinstance(kernel.const_value, CheckpointTensor):
        raise ExportError("patch embedding: the Conv's kernel is not a weight of the checkpoint")
    strides = conv.attributes.get("strides")
    if strides is None or tuple(strides.as_ints()) != kernel.const_value.shape.numpy()[2:]:
        raise ExportError("patch embedding: the Conv's stride is not its kernel, so patches overlap or skip")
    matrix = kernel.const_value.with_layout(f"{kernel.name}.matrix", flatten=True, transpose=True)
    weight = add_initializer(model.graph, matrix)
    builder = tape.Tape()
    embedded = builder.op("Add", [builder.op("MatMul", [pixels, weight]), bias])
    model.graph.insert_before(conv, builder.nodes)
    convenience.replace_all_uses_with(consumer.outputs[0], embedded)
    model.graph.remove([consumer, conv], safe=True)
    return 1
