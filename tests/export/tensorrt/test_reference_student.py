"""The reference student in every precision: what its graphs hold (L0), and that TensorRT-RTX builds them (L3).

TensorRT-RTX parses and builds without a GPU. That says nothing about speed, nor what an engine answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.support.quantized import quantized_checkpoint
from tests.support.tensorrt_api import on_linux_x86_64
from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.engines import Profile
from zreward.export.graph import Graphs, graphs_from_checkpoint
from zreward.export.passes.qdq_products import TENSORRT_GROUPS
from zreward.export.storage import write_graph
from zreward.export.targets.tensorrt import lower_to_tensorrt
from zreward.export.tensorrt.job import EngineJob
from zreward.export.tensorrt.profiles import profiles
from zreward.export.tensorrt.worker import build_in_child
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.quant.scheme import Scheme, resolve
from zreward.tensorrt_library import FLAVOURS

PRECISIONS: dict[str, tuple[ir.DataType, str | None]] = {
    "none": (ir.DataType.FLOAT, None),
    "fp16": (ir.DataType.FLOAT16, None),
    "bf16": (ir.DataType.BFLOAT16, None),
    "int8": (ir.DataType.FLOAT16, "int8-static"),
    "int8-weight": (ir.DataType.FLOAT16, "int8-weight"),
    "int4": (ir.DataType.FLOAT16, "int4"),
    "fp8": (ir.DataType.FLOAT16, "fp8"),
}
BUILT = [name for name in PRECISIONS if name != "bf16"]
GRAPHS = ("vision", "decoder")

Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(reference_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder with the graphs of a precision, each lowered once; inputs of 8 bits have one scale for all."""
    checkpoint = Checkpoint.open(reference_student)
    built = graphs_from_checkpoint(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    folders: dict[str, Path] = {}

    def write(precision: str) -> Path:
        if precision not in folders:
            dtype, scheme = PRECISIONS[precision]
            weights = None
            if scheme is not None:
                formats = resolve(Scheme.parse(scheme, TENSORRT_GROUPS), shapes).formats
                _, weights = quantized_checkpoint(checkpoint, formats)
                weights.scales = dict.fromkeys(formats, 0.05)
            graphs = Graphs(built.vision.clone(), built.decoder.clone())
            lower_to_tensorrt(
                graphs,
                code_ids=range(20, 29),
                bins=[1 + i / 2 for i in range(9)],
                n_positions=512,
                stored_type=dtype,
                label_mass=False,
                quantized=weights,
            )
            folders[precision] = tmp_path_factory.mktemp(precision)
            for name in GRAPHS:
                write_graph(getattr(graphs, name), folders[precision] / f"{name}.onnx", lambda _: None)
        return folders[precision]

    return write


@pytest.fixture(scope="module")
def sizes(reference_student: Path) -> Mapping[str, tuple[Profile, ...]]:
    contract = ScoreContract.load(reference_student)
    return profiles(contract, PromptEncoder(contract, load_tokenizer(reference_student)), 2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_keep_the_contract_of_the_target(written: Written, precision: str) -> None:
    dtype, scheme = PRECISIONS[precision]
    blocks = set()
    for name in GRAPHS:
        path = written(precision) / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        functions = {(f.domain, f.name) for f in model.functions}
        assert {domain for domain, _ in functions} <= {"zreward"}
        assert {(node.domain, node.op_type) for node in model.graph.node if node.domain} == functions
        assert max(entry.version for entry in model.opset_import) <= 24
        types = Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) > 1)
        ops = Counter(node.op_type for node in model.graph.node)
        assert (types[TensorProto.INT4] > 0) == (scheme == "int4")
        assert (types[TensorProto.INT8] > 0) == (scheme is not None and scheme.startswith("int8"))
        assert (types[TensorProto.FLOAT8E4M3FN] > 0) == (scheme == "fp8")
        assert (ops["QuantizeLinear"] > 0) == (scheme in ("int8-static", "fp8"))
        assert (types[dtype.value] > 0) or scheme is not None
        blocks |= {
            attribute.i
            for node in model.graph.node
            for attribute in node.attribute
            if node.op_type == "DequantizeLinear" and attribute.name == "block_size"
        }
    assert blocks == ({64, 128} if scheme == "int4" else set())  # 192 inputs are no multiple of 128


@on_linux_x86_64
@pytest.mark.parametrize("precision", BUILT)
def test_tensorrt_rtx_builds_it(
    written: Written,
    sizes: Mapping[str, tuple[Profile, ...]],
    precision: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    for name in GRAPHS:
        engine = tmp_path / f"{name}.engine"
        kinds = FLAVOURS["tensorrt-rtx"].float8_kinds if precision == "fp8" else ()
        graph = written(precision) / f"{name}.onnx"
        job = EngineJob("tensorrt-rtx", str(graph), str(engine), sizes[name], compute_capabilities=kinds)
        facts = build_in_child(job, lambda stage, done, total: None)
        assert facts.plugin_layers == 0
        assert set(facts.inputs) >= (
            {"pixel_values"} if name == "vision" else {"inputs_embeds", "last_index"}
        )
        stored = (written(precision) / f"{name}.onnx.data").stat().st_size
        assert engine.stat().st_size > stored / 2
        sizes_in_bytes = f"weights {stored:>9,} bytes, engine {engine.stat().st_size:>10,} bytes"
        record_property("engine", f"{precision:12} {name:8} {sizes_in_bytes}")
