"""zreward.export.work: the multiply-adds of the graphs are those of transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3_5ForConditionalGeneration

from tests.support.graphs import model_from_text
from tests.support.models import Shape, write_checkpoint
from tests.support.quantized import quantized_checkpoint
from zreward.bundle import Bundle, GraphWork, Work
from zreward.checkpoint import Checkpoint
from zreward.export.graph import Graphs, graphs_from_checkpoint
from zreward.export.targets.cpu import lower_to_cpu
from zreward.export.targets.portable import lower_to_portable
from zreward.export.targets.tensorrt import lower_to_tensorrt
from zreward.export.work import UncountedError, graph_work, work_of, work_or_none
from zreward.quant.scheme import Scheme, resolve

HEAD: dict[str, Any] = {"code_ids": list(range(9)), "bins": [1.0] * 9, "n_positions": 512}
UNEQUAL = Shape(heads=(6, 3), linear_heads=(2, 6), linear_dims=(24, 16), vision_depth=3, tied=False)
LOWER = pytest.mark.parametrize("lower", [lower_to_cpu, lower_to_portable, lower_to_tensorrt])
N_PATCHES = 24


def work_after(checkpoint: Checkpoint, lower: Callable[..., None], **how: Any) -> Work:
    graphs = graphs_from_checkpoint(checkpoint)
    lower(graphs, **{**HEAD, "stored_type": ir.DataType.FLOAT, "label_mass": False, **how})
    return work_of(graphs)


def expected_work(path: Path) -> Work:
    """From the modules and the config of transformers, and for the tower from a run of it."""
    model: Any = Qwen3_5ForConditionalGeneration.from_pretrained(path, attn_implementation="eager")
    text = model.config.text_config
    layers = model.model.language_model.layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    convolutions = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Conv1d))
    n_full = text.layer_types.count("full_attention")
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    recurrent = convolutions + 3 * state * (len(layers) - n_full)
    attention = n_full * text.num_attention_heads * 2 * text.head_dim
    last = layers[-1]
    mixer = (
        last.self_attn.o_proj
        if n_full and text.layer_types[-1] == "full_attention"
        else last.linear_attn.out_proj
    )
    once = sum(m.weight.numel() for m in [mixer, *last.mlp.modules()] if isinstance(m, torch.nn.Linear))
    decoder = GraphWork(0, linear - once, recurrent, attention, 0, 0, once + 9 * text.hidden_size)
    return Work(vision_work(model), decoder)


def vision_work(model: Any) -> GraphWork:
    """What torch counts while the tower looks at two images, solved for the two unknowns."""
    tower, config = model.model.visual, model.config.vision_config
    width = 3 * config.temporal_patch_size * config.patch_size**2
    counted = []
    for n_rows in (4, 8):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(torch.zeros(6 * n_rows, width), torch.tensor([[1, n_rows, 6]]))
        counted.append(counter.get_total_flops() // 2)
    attention, rest = divmod(counted[1] - 2 * counted[0], 2 * N_PATCHES**2)
    assert rest == 0
    linear, rest = divmod(counted[0] - attention * N_PATCHES**2, N_PATCHES)
    assert rest == 0
    return GraphWork(0, linear, 0, attention, 0, 0, 0)


@LOWER
@pytest.mark.parametrize("shape", [Shape(), UNEQUAL])
def test_the_count_is_that_of_transformers(tmp_path: Path, shape: Shape, lower: Callable[..., None]) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", shape)
    assert work_after(Checkpoint.open(path), lower) == expected_work(path)


@LOWER
def test_the_reference_student(reference_student: Path, lower: Callable[..., None]) -> None:
    """Once by hand: hidden 192, ffn 512, 3 of 4 layers DeltaNet with 4 heads of 48, tower 128 × 4 with ffn 384."""
    found = work_after(Checkpoint.open(reference_student), lower, stored_type=ir.DataType.FLOAT16)
    delta_net = 192 * (3 * 192 + 192 + 4 + 4) + 192 * 192
    full = 192 * (2 * 192 + 96 + 96) + 192 * 192
    tower = 864 * 128 + 4 * (128 * 3 * 128 + 128 * 128 + 2 * 128 * 384) + (512 * 512 + 512 * 192) // 4
    assert found == Work(
        vision=GraphWork(0, tower, 0, 4 * 2 * 128, 0, 0, 0),
        decoder=GraphWork(
            integer_per_row=0,
            float_per_row=3 * delta_net + full - 192 * 192 + 3 * 3 * 192 * 512,
            recurrent_per_row=3 * (3 * 4 * 48 * 48 + 4 * 576),
            attention_per_pair=2 * 192,
            rounded_attention_per_pair=0,
            integer_per_sequence=0,
            float_per_sequence=192 * 192 + 3 * 192 * 512 + 9 * 192,
        ),
    )


@pytest.mark.parametrize("scheme", ["int8", "int4-g16", "int8-weight-g16-asym"])
@pytest.mark.parametrize("level", [0, 4])
def test_quantized_products_are_whole_numbers_where_inputs_are_rounded(
    checkpoint_path: Path, scheme: str, level: int
) -> None:
    floats = Checkpoint.open(checkpoint_path)
    shapes = {name: info.shape for name, info in floats.tensors.items()}
    checkpoint, _ = quantized_checkpoint(floats, resolve(Scheme.parse(scheme), shapes).formats)
    found = work_after(checkpoint, lower_to_cpu, quantized=checkpoint.weights, accuracy_level=level)
    plain = work_after(floats, lower_to_cpu)
    for graph in ("vision", "decoder"):
        quantized, before = getattr(found, graph), getattr(plain, graph)
        assert quantized.integer_per_row + quantized.float_per_row == before.float_per_row
        rounds_inputs = scheme == "int8" or level == 4
        assert (quantized.integer_per_row > before.float_per_row / 2) == rounds_inputs
        rounded, plain_attention = quantized.rounded_attention_per_pair, before.attention_per_pair
        assert rounded == (plain_attention if rounds_inputs else 0)
        assert rounded + quantized.attention_per_pair == plain_attention
        assert quantized.recurrent_per_row == before.recurrent_per_row
        last = quantized.integer_per_sequence + quantized.float_per_sequence
        assert last == before.float_per_sequence
    portable = work_after(checkpoint, lower_to_portable, quantized=checkpoint.weights)
    assert portable == work_after(floats, lower_to_portable)


def test_label_mass_reads_the_vocabulary(checkpoint_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoint_path)
    hidden, rows = checkpoint.text_config["hidden_size"], checkpoint.text_config["vocab_size"]
    found = work_after(checkpoint, lower_to_cpu, label_mass=True)
    plain = work_after(checkpoint, lower_to_cpu)
    more = found.decoder.float_per_sequence - plain.decoder.float_per_sequence
    assert more == hidden * (rows + 9)  # the codes' rows once more, for the share


@pytest.mark.parametrize(
    "body",
    [
        "g (float[N, 8] x, float[8, 4] w) => (float[N, 4] y) { y = Gemm(x, w) }",
        "g (float[N, 8] x, float[8, 4] w) => (float[N, 4] y) { y = com.microsoft.FusedGemm(x, w) }",
        "g (float[N, 8] x) => (float[N, N] y) { t = Transpose<perm = [1, 0]>(x) y = MatMul(x, t) }",
        'g (float[N, 8] x) => (float[N, N] y) { y = Einsum<equation = "ik,jk->ij">(x, x) }',
    ],
)
def test_what_is_not_known_is_an_error_and_never_a_zero(tmp_path: Path, body: str) -> None:
    model = model_from_text(body)
    for value in list(model.graph.inputs):
        if value.name == "w":
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor([[0.0] * 4] * 8, name="w")
            model.graph.register_initializer(value)
    with pytest.raises(UncountedError):
        graph_work(model)
    assert work_or_none(Graphs(model, model)) is None


def test_it_stands_in_the_manifest_and_older_bundles_open(bundle_path: Path, checkpoint_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    assert bundle.manifest.work == expected_work(checkpoint_path)
    older = {k: v for k, v in bundle.manifest.to_dict().items() if k != "work"}
    assert type(bundle.manifest).from_dict(older, "here").work is None
