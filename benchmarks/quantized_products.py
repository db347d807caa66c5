"""Quantized products on the layer shapes of the 0.8B model: milliseconds and ratios.

    python benchmarks/quantized_products.py --json build/quantized-products.json

Every layer is a graph of all products that read one input (gate and up, queries, keys and values, …), lowered by
the passes that exports use, and runs with the kernels of `zreward.runtime.kernels` or, where its name says so, without
them. Beside them: DynamicQuantizeMatMul as it is, which finds one scale for all rows and whose speed is the bound to
keep, the same on rows divided by their largest magnitude, and float32. A repetition runs each form once, in turn, so
that a change of the machine's speed meets all of them; quoted are medians, and the median of the ratios within a
repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir import tape

from zreward.export.irtools import add_initializer
from zreward.export.passes.quantized_products import quantize_products_for_onnxruntime
from zreward.export.weights import CheckpointTensor, Layout
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import QuantizedWeight, WeightFormat
from zreward.runtime.kernels import compiled_library

BOUND = 0.85
"""Of DynamicQuantizeMatMul's speed, which the per-token form must keep on every layer."""

LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "attention q, k, v": (1024, (4096, 512, 512)),
    "attention output": (2048, (1024,)),
    "DeltaNet qkv, z": (1024, (6144, 2048)),
    "DeltaNet output": (2048, (1024,)),
    "gate, up": (1024, (3584, 3584)),
    "down": (3584, (1024,)),
    "vision qkv": (768, (2304,)),
    "vision proj": (768, (768,)),
    "vision fc1": (768, (3072,)),
    "vision fc2": (3072, (768,)),
    "merger fc1": (3072, (3072,)),
    "merger fc2": (3072, (1024,)),
}
"""Inputs, and the outputs of each product that reads them."""

PLAIN, PER_TOKEN, NO_KERNELS = "DynamicQuantizeMatMul", "int8 per token", ", no kernels"


@dataclass(frozen=True)
class RandomWeights:
    """Random codes of one format, as a source of quantized weights."""

    shapes: Mapping[str, tuple[int, int]]
    format: WeightFormat

    @property
    def formats(self) -> Mapping[str, WeightFormat]:
        return dict.fromkeys(self.shapes, self.format)

    def shape(self, name: str) -> tuple[int, int]:
        return self.shapes[name]

    def weight(self, name: str) -> QuantizedWeight:
        out, inputs = self.shapes[name]
        rng = np.random.default_rng(out)
        codes = rng.integers(1, self.format.max_code + 1, (out, inputs), dtype=np.uint8)
        groups = (out, self.format.n_groups(inputs))
        scales = np.full(groups, 2.0**-8, dtype=np.float32)
        return QuantizedWeight(
            self.format, codes, scales, np.full(groups, self.format.middle, dtype=np.uint8)
        )

    def summary(self) -> dict[str, Any]:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1200, 336, 56])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"onnxruntime {version('onnxruntime')}, {arguments.threads} threads, {os.cpu_count()} cores")
    results = []
    for rows in arguments.rows:
        print_header(rows)
        for name in arguments.layers:
            samples = measured(*LAYERS[name], rows, arguments.threads, arguments.repetitions)
            results.append({"layer": name, "rows": rows, "seconds": samples})
            print_line(name, rows, samples)
    kept = {(r["layer"], r["rows"]): ratio(r["seconds"], PER_TOKEN) for r in results}
    (layer, rows), slowest = min(kept.items(), key=lambda item: item[1])
    verdict = "at least" if slowest >= BOUND else "LESS THAN"
    print(f"\n{PER_TOKEN} keeps {slowest:.2f} of {PLAIN}'s speed or more ({layer}, {rows} rows):", end=" ")
    print(f"{verdict} the bound of {BOUND}")
    if arguments.json:
        machine = {"onnxruntime": version("onnxruntime"), "threads": arguments.threads}
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")


def measured(
    inputs: int, outputs: tuple[int, ...], rows: int, threads: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each repetition, by form."""
    runs = {
        name: run_of(build(inputs, outputs), rows, inputs, threads, kernels=not name.endswith(NO_KERNELS))
        for name, build in FORMS.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return samples


def run_of(model: ir.Model, rows: int, inputs: int, threads: int, *, kernels: bool) -> Callable[[], Any]:
    """One run of the graph on random rows of which one has an outlier, its results left in the runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # A session's threads spin for a while after a run, and would take a core from the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    compiled = compiled_library()
    if kernels and compiled is not None:
        options.register_custom_ops_library(str(compiled))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((1, rows, inputs)).astype(np.float32)
    x[0, rows // 2, 0] = 100
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def float_products(
    inputs: int, outputs: tuple[int, ...], chosen: WeightFormat
) -> tuple[ir.Model, RandomWeights]:
    """A graph of MatMuls that read one input, and the quantized weights that they are bound to."""
    weights = RandomWeights({f"w{i}": (out, inputs) for i, out in enumerate(outputs)}, chosen)
    checkpoint = QuantizedCheckpoint(Path(), {}, {}, weights)
    x = ir.Value(name="x", shape=ir.Shape([1, "rows", inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    builder, graph = tape.Tape(), ir.Graph([x], [], nodes=[], opset_imports={"": 24, "com.microsoft": 1})
    for index, name in enumerate(weights.shapes):
        tensor = CheckpointTensor(checkpoint, Layout(name, transpose=True), name)
        y = builder.op("MatMul", [x, add_initializer(graph, tensor)])
        y.name, y.type, y.shape = f"y{index}", x.type, ir.Shape([1, "rows", outputs[index]])
        graph.outputs.append(y)
    graph.extend(builder.nodes)
    return ir.Model(graph, ir_version=11), weights


def lowered(chosen: WeightFormat, level: int) -> Callable[[int, tuple[int, ...]], ir.Model]:
    """Builds the graph that an export writes."""

    def build(inputs: int, outputs: tuple[int, ...]) -> ir.Model:
        model, weights = float_products(inputs, outputs, chosen)
        quantize_products_for_onnxruntime(model, weights, accuracy_level=level)
        return model

    return build


def dynamic(*, divided: bool) -> Callable[[int, tuple[int, ...]], ir.Model]:
    """Builds DynamicQuantizeMatMul on the input as it is, or on rows divided by their largest magnitude."""

    def build(inputs: int, outputs: tuple[int, ...]) -> ir.Model:
        model, weights = float_products(inputs, outputs, WeightFormat(8, activations="int8"))
        graph, builder = model.graph, tape.Tape()
        x = graph.inputs[0]
        peak = None
        if divided:
            axis = add_initializer(graph, ir.tensor(np.array([-1]), name="axis"))
            tiny = add_initializer(graph, ir.tensor(np.float32(1e-30), name="tiny"))
            peak = builder.op("Max", [builder.op("ReduceMax", [builder.op("Abs", [x]), axis]), tiny])
            x = builder.op("Div", [x, peak])
        results = []
        for name, (out, _) in weights.shapes.items():
            weight = weights.weight(name)
            signed = (weight.codes ^ np.uint8(128)).view(np.int8).T.copy()
            codes = add_initializer(graph, ir.tensor(signed, name=f"{name}.codes"))
            scales = add_initializer(graph, ir.tensor(weight.scales[:, 0].copy(), name=f"{name}.scales"))
            y = builder.op("DynamicQuantizeMatMul", [x, codes, scales], domain="com.microsoft")
            y = y if peak is None else builder.op("Mul", [y, peak])
            y.name, y.type = f"{name}.y", ir.TensorType(ir.DataType.FLOAT)
            y.shape = ir.Shape([1, "rows", out])
            results.append(y)
        old = list(graph)
        graph.outputs[:] = results
        graph.extend(builder.nodes)
        graph.remove(old, safe=True)
        for name in weights.shapes:
            del graph.initializers[name]
        return model

    return build


FORMS: dict[str, Callable[[int, tuple[int, ...]], ir.Model]] = {
    PLAIN: dynamic(divided=False),
    PER_TOKEN: lowered(WeightFormat(8, activations="int8"), 4),
    f"int8{NO_KERNELS}": lowered(WeightFormat(8, activations="int8"), 4),
    "divided rows": dynamic(divided=True),
    "4 bits": lowered(WeightFormat(4, 64), 4),
    f"4 bits{NO_KERNELS}": lowered(WeightFormat(4, 64), 4),
    "4 bits, float inputs": lowered(WeightFormat(4, 64), 0),
    "8 bits in groups": lowered(WeightFormat(8, 128), 4),
    "float32": lambda inputs, outputs: float_products(inputs, outputs, WeightFormat(8))[0],
}


def ratio(samples: Mapping[str, list[float]], form: str) -> float:
    """Speed of `form` as a share of DynamicQuantizeMatMul's."""
    return statistics.median(a / b for a, b in zip(samples[PLAIN], samples[form], strict=True))


def print_header(rows: int) -> None:
    print(f"\n{rows} rows: milliseconds, and speed as a share of {PLAIN}'s")
    print(f"{'':<26}" + "".join(f"{name:>23}" for name in FORMS))


def print_line(name: str, rows: int, samples: Mapping[str, list[float]]) -> None:
    inputs, outputs = LAYERS[name]
    cells = [f"{1e3 * statistics.median(samples[f]):.2f} ms ({ratio(samples, f):.2f})" for f in FORMS]
    rate = 2e-9 * rows * inputs * sum(outputs) / statistics.median(samples[PLAIN])
    print(f"{name:<26}" + "".join(f"{cell:>23}" for cell in cells) + f"   {PLAIN}: {rate:.0f} GOP/s")


if __name__ == "__main__":
    main()
