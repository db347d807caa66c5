"""The TensorRT plugins in a small C++ host that calls them as TensorRT does, on emulated kernels.

What the host answers comes through the plugin interfaces of the library alone. docs/tensorrt.md is the reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import references
from tests.support.plugins import (
    BF16,
    FIELD_CHAR,
    FIELD_FLOAT32,
    FIELD_FLOAT64,
    FIELD_INT32,
    FIELD_INT64,
    FLOAT,
    HALF,
    INT32,
    Field,
    Host,
    Plugin,
    RefusedError,
)
from zreward.plugins import NAMESPACE, OPERATORS, VERSION, described

ROOT = Path(__file__).resolve().parent.parent.parent

RULE: list[Field] = [
    ("key_heads", FIELD_INT32, 2),
    ("value_heads", FIELD_INT32, 4),
    ("scale", FIELD_FLOAT32, 0.125),
    ("key_epsilon", FIELD_FLOAT32, 1e-6),
]
HEAD: list[Field] = [("epsilon", FIELD_FLOAT32, 1e-6)]
FIELDS: dict[str, list[Field]] = {"RubricExpectation": HEAD, "CausalConv1d": [], "GatedDeltaRule": RULE}

# B = 6 rows, S = 5 tokens, n = 3 states; hidden width 96 and 9 bins; 16 channels and 4 taps; keys of 32, values of 40.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "RubricExpectation": [(6, 96), (96,), (9, 96), (6,), (9,)],
    "CausalConv1d": [(6, 5, 16), (16, 4), (3, 16, 3)],
    "GatedDeltaRule": [(6, 5, 2 * 2 * 32 + 4 * 40), (6, 5, 4), (6, 5, 4), (3, 4, 32, 40)],
}
OUTPUTS: dict[str, list[tuple[int, ...]]] = {
    "RubricExpectation": [(6, 9), (6,), (6,)],
    "CausalConv1d": [(6, 5, 16), (6, 16, 3)],
    "GatedDeltaRule": [(6, 5, 160), (6, 4, 32, 40)],
}
COMPUTED_OUTPUTS = {"RubricExpectation": 0, "CausalConv1d": 1, "GatedDeltaRule": 1}
"""How many outputs, from the first, have the type of the first input; the others are float32."""


def types_of(operator: str, computed: int) -> list[int]:
    return [computed] + [FLOAT] * (len(SHAPES[operator]) - 1)


def output_types_of(operator: str, computed: int) -> list[int]:
    n_computed, count = COMPUTED_OUTPUTS[operator], len(OUTPUTS[operator])
    return [computed] * n_computed + [FLOAT] * (count - n_computed)


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def plugin(host: Host, operator: str) -> Plugin:
    return host.create(operator, FIELDS[operator])


def test_the_library_has_a_creator_for_each_operator(host: Host) -> None:
    assert [c.name for c in host.creators] == list(OPERATORS)
    for creator in host.creators:
        assert (creator.version, creator.namespace) == (VERSION, NAMESPACE)
        assert creator.attributes == {name: kind for name, kind, _ in FIELDS[creator.name]}


def test_the_library_says_the_same_without_a_host(host: Host, emulated: Path) -> None:
    said = described(emulated / "libplugins.so")
    assert re.fullmatch(r"\d+\.\d+\.\d+", said["tensorrt"])
    assert [(p["name"], p["version"], p["namespace"], p["attributes"]) for p in said["plugins"]] == [
        (c.name, c.version, c.namespace, list(c.attributes)) for c in host.creators
    ]
    assert described(emulated / "libkernels.so")["plugins"] == []


def test_the_reference_lists_the_same_tensors_and_attributes(host: Host) -> None:
    """docs/tensorrt.md, whose tables users read, against what the library declares."""
    text = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    for creator in host.creators:
        section = text.split(f"### {creator.name}\n")[1].split("\n### ")[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if "|" in line
        ]
        attributes = [row[1].strip("`") for row in rows if row[0] == "attribute"]
        assert attributes == list(creator.attributes), creator.name
        assert len([row for row in rows if row[0].startswith("in ")]) == len(SHAPES[creator.name])
        assert len([row for row in rows if row[0].startswith("out ")]) == len(OUTPUTS[creator.name])


# Serialization and copies


def test_attributes_survive_an_engine(host: Host, operator: str, plugin: Plugin) -> None:
    """What is serialized makes the same plugin in the other phase, again and again."""
    kept = plugin.serialize()
    assert kept == [(name, kind, pytest.approx(value, rel=1e-7)) for name, kind, value in FIELDS[operator]]
    again = host.create(operator, kept, phase=1)
    assert again.serialize() == kept
    assert again.output_shapes(SHAPES[operator]) == plugin.output_shapes(SHAPES[operator])


def test_copies_are_of_their_own(operator: str, host: Host) -> None:
    plugin = host.create(operator, FIELDS[operator])
    kept = plugin.serialize()
    copies = [plugin.clone(), plugin.attach()]
    plugin.close()
    for copy in copies:
        assert copy.name() == f"{operator} {VERSION} {NAMESPACE}"
        assert copy.serialize() == kept
        copy.close()


def test_wider_types_of_attributes_are_taken(host: Host) -> None:
    """Parsers give integers of 64 bits as well."""
    fields = [
        ("key_heads", FIELD_INT64, 2),
        ("value_heads", FIELD_INT64, 4),
        ("scale", FIELD_FLOAT64, 0.125),
        RULE[3],
    ]
    assert (
        host.create("GatedDeltaRule", fields).serialize() == host.create("GatedDeltaRule", RULE).serialize()
    )


def test_attributes_that_choose_the_plugin_are_ignored(host: Host) -> None:
    fields = [
        *HEAD,
        ("plugin_version", FIELD_CHAR, list("1")),
        ("plugin_namespace", FIELD_CHAR, list("zreward")),
    ]
    assert [name for name, _, _ in host.create("RubricExpectation", fields).serialize()] == ["epsilon"]


def changed(fields: Sequence[Field], name: str, *replacement: Field) -> list[Field]:
    """The fields with the one of that name replaced."""
    return [f for field in fields for f in (replacement if field[0] == name else (field,))]


WRONG: dict[str, tuple[str, list[Field], str]] = {
    "missing": ("GatedDeltaRule", changed(RULE, "scale"), "GatedDeltaRule: attribute scale is missing"),
    "none": ("RubricExpectation", [], "RubricExpectation: attribute epsilon is missing"),
    "unknown": (
        "CausalConv1d",
        [("dilation", FIELD_INT32, 2)],
        "CausalConv1d: there is no attribute dilation",
    ),
    "twice": ("RubricExpectation", [*HEAD, *HEAD], "RubricExpectation: attribute epsilon is given twice"),
    "an integer for a float": (
        "RubricExpectation",
        [("epsilon", FIELD_INT32, 1)],
        "RubricExpectation: attribute epsilon has another type (TensorRT's number 5); one float is expected",
    ),
    "a float for an integer": (
        "GatedDeltaRule",
        changed(RULE, "key_heads", ("key_heads", FIELD_FLOAT32, 2.0)),
        "GatedDeltaRule: attribute key_heads has another type (TensorRT's number 1); one integer is expected",
    ),
    "a list": (
        "RubricExpectation",
        [("epsilon", FIELD_FLOAT32, [1e-6, 1e-6])],
        "RubricExpectation: attribute epsilon has 2 values; one float is expected",
    ),
    "negative": (
        "RubricExpectation",
        [("epsilon", FIELD_FLOAT32, -1e-6)],
        "RubricExpectation: attribute epsilon is -1e-06; 0 to 1 are taken",
    ),
    "not a number": (
        "GatedDeltaRule",
        changed(RULE, "scale", ("scale", FIELD_FLOAT32, math.nan)),
        "GatedDeltaRule: attribute scale is nan; -1e+30 to 1e+30 are taken",
    ),
    "no heads": (
        "GatedDeltaRule",
        changed(RULE, "key_heads", ("key_heads", FIELD_INT32, 0)),
        "GatedDeltaRule: attribute key_heads is 0; 1 to ",
    ),
    "beyond 32 bits": (
        "GatedDeltaRule",
        changed(RULE, "value_heads", ("value_heads", FIELD_INT64, 2**40)),
        "GatedDeltaRule: attribute value_heads is ",
    ),
    "heads that do not divide": (
        "GatedDeltaRule",
        changed(RULE, "key_heads", ("key_heads", FIELD_INT32, 3)),
        "GatedDeltaRule: value_heads is 4, which is no multiple of key_heads, 3",
    ),
}


@pytest.mark.parametrize("phase", [0, 1], ids=["model", "engine"])
@pytest.mark.parametrize(("operator_name", "fields", "message"), WRONG.values(), ids=WRONG)
def test_wrong_attributes_are_refused(
    host: Host, operator_name: str, fields: list[Field], message: str, phase: int
) -> None:
    with pytest.raises(RefusedError) as refused:
        host.create(operator_name, fields, phase=phase)
    assert str(refused.value).startswith(f"error: {message}")
    assert str(refused.value).count("\n") == 1


# Shapes


def test_output_shapes(operator: str, plugin: Plugin) -> None:
    found = plugin.output_shapes(SHAPES[operator])
    assert [tuple(map(int, shape)) for shape in found] == OUTPUTS[operator]


def test_output_shapes_of_unknown_sizes(host: Host) -> None:
    """Rows, tokens and states are known at run time only; letters count the axes of all inputs from a."""
    head = host.create("RubricExpectation", HEAD)
    assert head.output_shapes([(-1, 96), (96,), (9, 96), (-1,), (9,)]) == [["a", "9"], ["a"], ["a"]]
    conv = host.create("CausalConv1d", [])
    assert conv.output_shapes([(-1, -1, 16), (16, 4), (-1, 16, 3)]) == [["a", "b", "16"], ["a", "16", "3"]]
    rule = host.create("GatedDeltaRule", RULE)
    shapes = [(-1, -1, 288), (-1, -1, 4), (-1, -1, 4), (-1, 4, 32, 40)]
    assert rule.output_shapes(shapes) == [["a", "b", "160"], ["a", "4", "32", "40"]]


WRONG_SHAPES: dict[str, tuple[str, int, tuple[int, ...], str]] = {
    "head, rank": ("RubricExpectation", 0, (6, 1, 96), "hidden has shape [6, 1, 96]; 2 axes are expected"),
    "head, width": (
        "RubricExpectation",
        2,
        (9, 64),
        "score_rows has shape [9, 64]; its axis 1 must have 96 elements, as",
    ),
    "head, rows": (
        "RubricExpectation",
        3,
        (5,),
        "temperature has shape [5]; its axis 0 must have 6 elements, as that of hidden",
    ),
    "head, bins": (
        "RubricExpectation",
        4,
        (8,),
        "bins has shape [8]; its axis 0 must have 9 elements, as that of score_rows",
    ),
    "conv, taps": ("CausalConv1d", 1, (16, 3), "the state holds 3 inputs; a kernel of width 3 needs 2"),
    "conv, wide": ("CausalConv1d", 1, (16, 5), "the kernel has width 5; 2 to 4 are taken"),
    "conv, states": ("CausalConv1d", 2, (4, 16, 3), "4 states cannot serve 6 rows"),
    "conv, no state": ("CausalConv1d", 2, (0, 16, 3), "0 states cannot serve 6 rows"),
    "rule, channels": (
        "GatedDeltaRule",
        0,
        (6, 5, 256),
        "qkv has 256 channels; 2 key heads of 32 and 4 value heads of 40 need 288",
    ),
    "rule, tokens": (
        "GatedDeltaRule",
        1,
        (6, 4, 4),
        "decay has shape [6, 4, 4]; its axis 1 must have 5 elements, as that of qkv",
    ),
    "rule, heads": (
        "GatedDeltaRule",
        3,
        (3, 5, 32, 40),
        "state has shape [3, 5, 32, 40]; its axis 1 must have 4 elements",
    ),
    "rule, head": (
        "GatedDeltaRule",
        3,
        (3, 4, 32, 264),
        "heads of values have 264 elements; multiples of 8 up to 256",
    ),
    "rule, states": ("GatedDeltaRule", 3, (4, 4, 32, 40), "4 states cannot serve 6 rows"),
}


@pytest.mark.parametrize(
    ("operator_name", "index", "shape", "message"), WRONG_SHAPES.values(), ids=WRONG_SHAPES
)
def test_wrong_shapes_are_refused(
    host: Host, operator_name: str, index: int, shape: tuple[int, ...], message: str
) -> None:
    """When the network is made, and when it runs with dynamic shapes."""
    plugin = host.create(operator_name, FIELDS[operator_name])
    shapes = [*SHAPES[operator_name]]
    shapes[index] = shape
    types = types_of(operator_name, FLOAT)
    for attempt in (
        lambda: plugin.output_shapes(shapes),
        lambda: plugin.configure(types, shapes),
        lambda: plugin.run(types, [np.zeros(s, np.float32) for s in shapes], []),
    ):
        with pytest.raises(RefusedError, match=re.escape(f"error: {operator_name}: {message}")):
            attempt()


def test_a_wrong_number_of_heads_is_refused(host: Host) -> None:
    shapes = [(6, 5, 2 * 2 * 32 + 8 * 40), (6, 5, 8), (6, 5, 8), (3, 8, 32, 40)]
    with pytest.raises(RefusedError, match="value_heads is 4, but state, decay or beta has 8 heads"):
        host.create("GatedDeltaRule", RULE).output_shapes(shapes)


def test_a_wrong_number_of_inputs_is_refused(host: Host) -> None:
    with pytest.raises(RefusedError, match="CausalConv1d: there are 2 inputs and 2 outputs; it has 3 and 2"):
        host.create("CausalConv1d", []).output_shapes(SHAPES["CausalConv1d"][:2])


def test_shapes_of_a_profile_are_taken(operator: str, plugin: Plugin) -> None:
    plugin.configure(types_of(operator, HALF), SHAPES[operator])


def test_workspace_grows_with_the_profile(host: Host) -> None:
    rule = host.create("GatedDeltaRule", RULE)
    types = types_of("GatedDeltaRule", BF16)

    def bytes_of(batch: int, tokens: int) -> int:
        return rule.workspace(
            types, [(batch, tokens, 288), (batch, tokens, 4), (batch, tokens, 4), (1, 4, 32, 40)]
        )

    assert 0 < bytes_of(1, 1) == bytes_of(1, 64) < bytes_of(1, 65)
    assert bytes_of(4, 1100) == 4 * 18 * bytes_of(1, 64)
    for other in ("RubricExpectation", "CausalConv1d"):
        assert host.create(other, FIELDS[other]).workspace(types_of(other, FLOAT), SHAPES[other]) == 0


# Types and formats


@pytest.mark.parametrize("computed", [FLOAT, HALF, BF16], ids=["fp32", "fp16", "bf16"])
def test_types_that_are_taken(operator: str, plugin: Plugin, computed: int) -> None:
    inputs, outputs = types_of(operator, computed), output_types_of(operator, computed)
    assert plugin.output_types(inputs) == outputs
    for position in range(len(inputs) + len(outputs)):
        assert plugin.supports(position, inputs + outputs, len(inputs))
        assert not plugin.supports(position, inputs + outputs, len(inputs), format=1), "linear tensors only"
        for other in {FLOAT, HALF, BF16, INT32} - {(inputs + outputs)[position]}:
            types = inputs + outputs
            types[position] = other
            allowed = position == 0 and other != INT32  # which the tensors after it then follow
            assert plugin.supports(position, types, len(inputs)) == allowed, (position, other)


def test_types_that_are_refused(operator: str, plugin: Plugin) -> None:
    types = types_of(operator, INT32)
    with pytest.raises(RefusedError, match="float32, float16 or bfloat16 is expected"):
        plugin.output_types(types)
    types = [HALF, HALF, *types[2:]]
    with pytest.raises(RefusedError, match=f"{operator}: .* float32 is expected"):
        plugin.output_types(types)


def test_a_position_that_does_not_exist_is_refused(operator: str, plugin: Plugin) -> None:
    types = types_of(operator, FLOAT) + output_types_of(operator, FLOAT)
    n_inputs = len(SHAPES[operator])
    assert not plugin.supports(len(types), types, n_inputs)
    assert not plugin.supports(-1, types, n_inputs)


# Arithmetic, through the plugin


def tensor_inputs(operator: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(shape) for shape in SHAPES[operator]]
    if operator == "RubricExpectation":
        inputs[3] = inputs[3].abs() + 0.5
        inputs[4] = torch.arange(1.0, 5.5, 0.5)
    if operator == "GatedDeltaRule":
        inputs[1] = -inputs[1].abs()
        inputs[2] = torch.sigmoid(inputs[2])
    return [inputs[0].to(dtype), *inputs[1:]]


def expected_outputs(operator: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """By the definitions in float64, from the plugin's own inputs."""
    if operator == "RubricExpectation":
        return list(references.rubric_expectation(*inputs, epsilon=1e-6))
    if operator == "CausalConv1d":
        return list(references.causal_conv1d(*inputs, silu=True))
    qkv, decay, beta, state = inputs
    query, key, value = (
        part.unflatten(-1, (-1, dim))
        for part, dim in zip(qkv.split([64, 64, 160], -1), (32, 32, 40), strict=True)
    )
    output, new_state = references.gated_delta_rule(
        query, key, value, decay, beta, state, scale=0.125, key_epsilon=1e-6
    )
    return [output.flatten(2), new_state]


@pytest.mark.parametrize(
    ("dtype", "number", "limit"),
    [(torch.float32, FLOAT, 1e-5), (torch.float16, HALF, 2e-3), (torch.bfloat16, BF16, 1e-2)],
    ids=["fp32", "fp16", "bf16"],
)
def test_enqueue_computes_the_operator(
    operator: str, plugin: Plugin, dtype: torch.dtype, number: int, limit: float
) -> None:
    inputs = tensor_inputs(operator, dtype)
    types = types_of(operator, number)
    kinds = {FLOAT: torch.float32, number: dtype}
    outputs = [
        torch.full(shape, math.nan, dtype=kinds[kind])
        for shape, kind in zip(OUTPUTS[operator], output_types_of(operator, number), strict=True)
    ]
    workspace = torch.full((plugin.workspace(types, SHAPES[operator]) // 4 + 4,), math.nan)
    before = [tensor.clone() for tensor in inputs]
    run_on_tensors(plugin, types, inputs, outputs, workspace)
    for found, expected in zip(outputs, expected_outputs(operator, inputs), strict=True):
        assert (found.double() - expected).abs().max() <= limit * expected.abs().max()
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy), "inputs stay as they were: states are shared"


def run_on_tensors(
    plugin: Plugin,
    types: list[int],
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    workspace: torch.Tensor,
) -> None:
    """numpy has no bfloat16, so tensors of 16 bits go as integers."""

    def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()

    plugin.run(types, [array(t) for t in inputs], [array(t) for t in outputs], array(workspace))


def test_a_kernel_that_refuses_says_why(host: Host) -> None:
    """A pointer that no vector can be loaded from: the message is the kernels' own."""
    conv = host.create("CausalConv1d", [])
    inputs = tensor_inputs("CausalConv1d", torch.float32)
    shifted = torch.zeros(6 * 5 * 16 + 1)[1:].view(6, 5, 16)
    outputs = [torch.zeros(shape) for shape in OUTPUTS["CausalConv1d"]]
    with pytest.raises(
        RefusedError, match="CausalConv1d: input is null or does not begin at a multiple of 16 bytes"
    ):
        run_on_tensors(conv, types_of("CausalConv1d", FLOAT), [shifted, *inputs[1:]], outputs, torch.zeros(4))
