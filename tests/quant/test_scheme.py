"""Schemes: reading, writing, and which tensor of a Qwen3.5 gets which format."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError
from zreward.quant.scheme import (
    DEFAULT_GROUPS,
    KEPT,
    PRODUCTS,
    Scheme,
    block_formats,
    format_name,
    parse_format,
    resolve,
    rule_for,
    with_static_inputs,
)
from zreward.quant.tensor import WeightFormat

LAYER = "model.language_model.layers.0"
VISION = "model.visual.blocks.0"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{LAYER}.mlp.down_proj.weight": (192, 512),
    f"{LAYER}.mlp.up_proj.weight": (512, 192),
    f"{LAYER}.linear_attn.in_proj_qkv.weight": (256, 192),
    f"{LAYER}.linear_attn.in_proj_a.weight": (4, 192),
    f"{LAYER}.linear_attn.conv1d.weight": (256, 1, 4),
    f"{LAYER}.linear_attn.A_log": (4,),
    f"{LAYER}.input_layernorm.weight": (192,),
    f"{VISION}.attn.qkv.weight": (384, 128),
    f"{VISION}.attn.qkv.bias": (384,),
    "model.language_model.embed_tokens.weight": (64, 192),
}

FORMATS = st.one_of(
    st.just(WeightFormat(8, activations="int8")),
    st.just(WeightFormat(8, activations="int8-static")),
    st.just(WeightFormat(8)),
    st.builds(WeightFormat, st.sampled_from([4, 8]), st.sampled_from([16, 32, 64, 128, 256]), st.booleans()),
)


@given(FORMATS)
def test_the_name_of_a_format_reads_back_as_the_format(fmt: WeightFormat) -> None:
    assert parse_format(format_name(fmt)) == fmt


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("none", None),
        ("int8", WeightFormat(8, 0, True, "int8")),
        ("int8-static", WeightFormat(8, 0, True, "int8-static")),
        ("fp8", WeightFormat(8, 0, True, "fp8-static")),
        ("int8-weight", WeightFormat(8, 128)),
        ("int8-weight-g0", WeightFormat(8)),
        ("int4", WeightFormat(4, 64)),
        ("int4-g32", WeightFormat(4, 32)),
        ("int4-asym", WeightFormat(4, 64, False)),
        ("int8-weight-g64-asym", WeightFormat(8, 64, False)),
    ],
)
def test_names_of_formats(name: str, fmt: WeightFormat | None) -> None:
    assert parse_format(name) == fmt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int3", "unknown format 'int3'; known are none, fp8, int8, int8-static, int8-weight and int4"),
        ("", "unknown format ''"),
        ("INT4", "unknown format"),
        ("fp8-static", "unknown format"),
        ("int4-asym-g32", "unknown format"),
        ("int4-g", "unknown format"),
        ("int4-g48", "not a power of two"),
        ("int4-g8", "choose 16 to 256"),
        ("int4-g512", "choose 16 to 256"),
        ("int8-g32", "need symmetric 8-bit weights with a scale per output"),
        ("int8-asym", "need symmetric"),
    ],
)
def test_unknown_formats_are_refused(name: str, message: str) -> None:
    for text in (name, f"int4,*.up_proj={name}"):
        with pytest.raises(QuantizationError, match=message):
            Scheme.parse(text)


@pytest.mark.parametrize("part", ["", "down_proj", "=int4", "int8"])
def test_an_exception_needs_a_pattern_and_a_format(part: str) -> None:
    with pytest.raises(QuantizationError, match="is not PATTERN=FORMAT"):
        Scheme.parse(f"int4,{part}")


def test_every_tensor_is_either_quantized_or_kept_for_a_reason() -> None:
    table = resolve(Scheme.parse("int4"), SHAPES)
    assert set(table.formats) | set(table.kept) == set(SHAPES)
    assert not set(table.formats) & set(table.kept)
    assert set(table.formats) == {
        f"{LAYER}.mlp.down_proj.weight",
        f"{LAYER}.mlp.up_proj.weight",
        f"{LAYER}.linear_attn.in_proj_qkv.weight",
        f"{VISION}.attn.qkv.weight",
    }
    assert "recurrent state" in table.kept[f"{LAYER}.linear_attn.in_proj_a.weight"]
    assert all(table.kept.values())


def test_the_shipped_student_has_a_rule_for_every_tensor(reference_student: Path) -> None:
    shapes = {name: info.shape for name, info in Checkpoint.open(reference_student).tensors.items()}
    table = resolve(Scheme.parse("int8"), shapes)
    assert len(table.formats) + len(table.kept) == len(shapes)
    assert not any(
        word in name
        for name in table.formats
        for word in ("norm", "conv1d", "in_proj_a.", "in_proj_b.", "embed", "lm_head", "bias")
    )


def test_a_tensor_without_a_rule_is_refused() -> None:
    with pytest.raises(
        QuantizationError, match=r"no rule says whether 'model\.layers\.0\.moe\.router\.weight'"
    ):
        resolve(Scheme.parse("int4"), {**SHAPES, "model.layers.0.moe.router.weight": (8, 192)})


def test_every_rule_has_a_reason_and_what_is_kept_is_tried_first() -> None:
    assert all(rule.reason for rule in KEPT + PRODUCTS)
    assert not rule_for("mtp.layers.0.mlp.down_proj.weight").quantizable
    assert not rule_for("model.visual.merger.norm.weight").quantizable
    assert rule_for("model.visual.merger.linear_fc1.weight").quantizable
    assert not rule_for("lm_head.weight").quantizable


def test_exceptions_are_tried_in_order() -> None:
    scheme = Scheme.parse("int4, model.visual.*=int8, *.down_proj=none, *.mlp.*=int4-g16-asym")
    table = resolve(scheme, SHAPES)
    assert table.formats[f"{VISION}.attn.qkv.weight"] == WeightFormat(8, 0, True, "int8")
    assert table.kept[f"{LAYER}.mlp.down_proj.weight"] == "the scheme leaves it as it is"
    assert table.formats[f"{LAYER}.mlp.up_proj.weight"] == WeightFormat(4, 16, False)
    assert table.formats[f"{LAYER}.linear_attn.in_proj_qkv.weight"] == WeightFormat(4, 64)
    assert table.scheme == scheme.text


def test_none_with_exceptions_quantizes_only_those() -> None:
    table = resolve(Scheme.parse("none,*.down_proj=int4"), SHAPES)
    assert table.formats == {f"{LAYER}.mlp.down_proj.weight": WeightFormat(4, 64)}


@pytest.mark.parametrize("text", ["none", "none,*.up_proj=none"])
def test_a_scheme_that_quantizes_nothing_is_refused(text: str) -> None:
    with pytest.raises(QuantizationError, match="quantizes nothing"):
        resolve(Scheme.parse(text), SHAPES)


@pytest.mark.parametrize("pattern", ["*.q_proj", "*.down_proj.weight", "model.visual", "*.A_log", "*.conv1d"])
def test_an_exception_that_names_no_quantizable_layer_is_refused(pattern: str) -> None:
    with pytest.raises(QuantizationError, match="names no layer of this checkpoint"):
        resolve(Scheme.parse(f"int4,{pattern}=int8"), SHAPES)


def test_an_exception_behind_one_that_takes_all_its_layers_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"'\*\.down_proj' names only layers that an earlier"):
        resolve(Scheme.parse("int4,*_proj=int8,*.down_proj=none"), SHAPES)
    table = resolve(Scheme.parse("int4,*.down_proj=none,*_proj=int8"), SHAPES)
    assert f"{LAYER}.mlp.down_proj.weight" in table.kept


def test_an_exception_for_a_layer_that_must_stay_gives_the_reason() -> None:
    with pytest.raises(QuantizationError, match=r"in_proj_a stays as it is: sets the decay"):
        resolve(Scheme.parse(f"int4,{LAYER}.linear_attn.in_proj_a=int8"), SHAPES)


def test_wildcards_pass_over_what_must_stay() -> None:
    table = resolve(Scheme.parse("int4,*.linear_attn.*=int8"), SHAPES)
    assert table.formats[f"{LAYER}.linear_attn.in_proj_qkv.weight"].bits == 8
    assert f"{LAYER}.linear_attn.in_proj_a.weight" in table.kept


def test_an_open_group_size_is_halved_and_a_named_one_must_divide() -> None:
    assert (
        resolve(Scheme.parse("int8-weight"), SHAPES).formats[f"{LAYER}.mlp.up_proj.weight"].group_size == 64
    )
    with pytest.raises(QuantizationError, match=r"up_proj: group size 128 does not divide 192"):
        resolve(Scheme.parse("int4-g128"), SHAPES)
    # A size that one exception names binds that exception only.
    mixed = resolve(Scheme.parse("int4,*.down_proj=int4-g128"), SHAPES).formats
    assert mixed[f"{LAYER}.mlp.up_proj.weight"].group_size == 64
    assert mixed[f"{LAYER}.mlp.down_proj.weight"].group_size == 128
    with pytest.raises(QuantizationError, match="100 inputs cannot be cut into groups of 16"):
        resolve(Scheme.parse("int4"), {f"{LAYER}.mlp.up_proj.weight": (8, 100)})


def test_formats_of_a_block() -> None:
    table = resolve(Scheme.parse("int4,*.down_proj=int8"), SHAPES)
    assert block_formats(table, f"{LAYER}.mlp.") == {
        "down_proj": WeightFormat(8, activations="int8"),
        "up_proj": WeightFormat(4, 64),
    }


def test_a_target_may_have_other_groups() -> None:
    groups = {**DEFAULT_GROUPS, "int4": 128, "int8-weight": 0}
    table = resolve(Scheme.parse("int4,*.up_proj=int8-weight", groups), SHAPES)
    assert table.formats[f"{LAYER}.mlp.down_proj.weight"] == WeightFormat(4, 128)
    assert table.formats[f"{LAYER}.mlp.up_proj.weight"] == WeightFormat(8)
    assert table.formats[f"{LAYER}.linear_attn.in_proj_qkv.weight"] == WeightFormat(4, 64)  # 192 inputs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", "int8-static"),
        ("int4,*.down_proj=int8,*.q_proj=int8-weight", "int4,*.down_proj=int8-static,*.q_proj=int8-weight"),
        ("int8-weight-g0", "int8-weight-g0"),
    ],
)
def test_int8_becomes_static_where_no_runtime_finds_scales(text: str, expected: str) -> None:
    assert with_static_inputs(text) == expected
