"""Formats that are refused, and dequantization against a loop over elements in float64."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zreward.errors import QuantizationError
from zreward.quant.float8 import NAN_CODES
from zreward.quant.tensor import CodebookFormat, CodebookWeight, QuantizedWeight, WeightFormat

FLOAT8 = WeightFormat(8, activations="fp8-static")


def weight(
    fmt: WeightFormat, out: int = 5, inputs: int = 64, order: NDArray[np.int64] | None = None
) -> QuantizedWeight:
    rng = np.random.default_rng(0)
    groups = fmt.n_groups(inputs)
    zeros = rng.integers(0, fmt.max_code + 1, (out, groups))
    return QuantizedWeight(
        fmt,
        rng.integers(0, fmt.max_code + 1, (out, inputs)).astype(np.uint8),
        (rng.random((out, groups)) + 0.01).astype(np.float16).astype(np.float32),
        (np.full_like(zeros, fmt.middle) if fmt.symmetric else zeros).astype(np.uint8),
        order,
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "fmt", [WeightFormat(b, g, s) for b in (4, 8) for g in (0, 16, 32) for s in (True, False)], ids=str
)
def test_dequantization_is_the_loop_in_float64(fmt: WeightFormat, act_order: bool) -> None:
    order = np.random.default_rng(1).permutation(64) if act_order else None
    stored = weight(fmt, order=order)
    size = fmt.group_size or 64
    expected = np.full(stored.shape, np.nan)
    for o in range(stored.shape[0]):
        for column in range(64):
            group = column // size
            level = int(stored.codes[o, column]) - int(stored.zeros[o, group])
            place = column if order is None else order[column]
            expected[o, place] = level * np.float64(stored.scales[o, group])
    values = stored.dequantized()
    assert values.dtype == np.float32
    assert np.array_equal(values, expected.astype(np.float32))


def test_floats_of_8_bits_are_those_of_their_codes() -> None:
    codes = np.array([code for code in range(256) if code not in NAN_CODES], np.uint8).reshape(2, 127)
    zeros, scales = np.zeros((2, 1), np.uint8), np.array([[0.5], [0.007]], np.float16).astype(np.float32)
    stored = QuantizedWeight(FLOAT8, codes, scales, zeros)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales
    assert np.array_equal(stored.dequantized(), expected)
    assert expected[0].max() == 224 and stored.n_bits == 8 * 254 + 2 * 16
    for code in NAN_CODES:
        with pytest.raises(QuantizationError, match="a code is NaN"):
            QuantizedWeight(FLOAT8, np.full((2, 3), code, np.uint8), scales, zeros)


@given(
    st.sampled_from([4, 8]),
    st.sampled_from([0, 16, 32, 64, 128, 256]),
    st.booleans(),
    st.integers(1, 8),
    st.integers(1, 7),
)
def test_stored_bits_are_those_of_codes_scales_and_zero_points(
    bits: int, group: int, symmetric: bool, groups: int, out: int
) -> None:
    fmt = WeightFormat(bits, group, symmetric)
    inputs = groups * (group or 24)
    stored = weight(fmt, out, inputs)
    expected = stored.codes.size * bits + stored.scales.size * 16
    expected += 0 if symmetric else stored.zeros.size * bits
    assert stored.n_bits == pytest.approx(expected, abs=1)
    assert fmt.bits_per_weight(inputs) == pytest.approx(expected / stored.codes.size)
    assert stored.scales.shape[1] == (groups if group else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "weights of 3 bits are not supported"),
        ({"bits": 16}, "choose 4 or 8"),
        ({"bits": 4, "group_size": 8}, "group size 8 is not supported"),
        ({"bits": 4, "group_size": 512}, "choose 16 to 256"),
        ({"bits": 4, "group_size": -1}, "group size -1"),
        ({"bits": 4, "group_size": 48}, "not a power of two"),
        ({"bits": 8, "activations": "int4"}, "none of float, int8"),
        ({"bits": 4, "activations": "int8"}, "need symmetric 8-bit weights"),
        ({"bits": 8, "group_size": 32, "activations": "int8"}, "a scale per output"),
        ({"bits": 8, "symmetric": False, "activations": "int8"}, "need symmetric"),
    ],
)
def test_formats_that_no_target_can_multiply_are_refused(
    arguments: dict[str, int | bool | str], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        WeightFormat(**arguments)  # type: ignore[arg-type]


def test_a_group_size_that_does_not_divide_is_refused_or_fitted() -> None:
    fmt = WeightFormat(4, 128)
    with pytest.raises(QuantizationError, match="group size 128 does not divide 192 inputs"):
        fmt.n_groups(192)
    assert fmt.fitted(192) == WeightFormat(4, 64)
    assert fmt.fitted(256) == fmt
    assert WeightFormat(8).fitted(100) == WeightFormat(8)
    with pytest.raises(QuantizationError, match="200 inputs cannot be cut into groups of 16"):
        fmt.fitted(200)


@given(st.sampled_from([16, 32, 64, 128, 256]), st.integers(1, 600))
def test_a_fitted_group_size_is_the_largest_power_of_two_that_divides(size: int, inputs: int) -> None:
    candidates = [s for s in (16, 32, 64, 128, 256) if s <= size and inputs % s == 0]
    if candidates:
        assert WeightFormat(4, size).fitted(inputs).group_size == max(candidates)
    else:
        with pytest.raises(QuantizationError, match="cannot be cut"):
            WeightFormat(4, size).fitted(inputs)


GOOD = weight(WeightFormat(4, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": GOOD.codes.astype(np.int8)}, r"uint8 \[out, in\], not int8 \[5, 64\]"),
        ({"codes": GOOD.codes[0]}, r"not uint8 \[64\]"),
        ({"codes": GOOD.codes | 16}, "a code exceeds 15, the largest of 4 bits"),
        ({"codes": GOOD.codes[:, :40]}, "does not divide 40"),
        ({"scales": GOOD.scales.astype(np.float16)}, r"float32 \(5, 4\), not float16"),
        ({"scales": GOOD.scales[:, :2]}, r"float32 \(5, 4\), not float32 \[5, 2\]"),
        ({"scales": -GOOD.scales}, "positive and finite"),
        ({"scales": GOOD.scales * np.float32("nan")}, "positive and finite"),
        ({"scales": GOOD.scales * 0}, "positive and finite"),
        ({"zeros": GOOD.zeros[:2]}, r"zero points must be uint8 \(5, 4\)"),
        ({"zeros": GOOD.zeros.astype(np.int64)}, "zero points must be uint8"),
        ({"order": np.zeros(64, np.int64)}, "not a permutation"),
        ({"order": np.arange(63)}, "not a permutation"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    changes: dict[str, NDArray[np.float32]], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message):
        dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]


def test_codebook_blocks_run_over_the_flattened_matrix() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 20)).astype(np.uint8)
    scales, table = rng.random(4).astype(np.float32), np.linspace(-1, 1, 16, dtype=np.float32)
    stored = CodebookWeight(CodebookFormat("nf4", 16), codes, scales, table)
    expected = [[table[codes[o, i]] * scales[(o * 20 + i) // 16] for i in range(20)] for o in range(3)]
    assert np.array_equal(stored.dequantized(), np.array(expected, np.float32))
    assert stored.shape == (3, 20)
    assert stored.format.bits_per_weight(20) == 6.0
