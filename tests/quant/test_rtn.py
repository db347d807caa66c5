"""Round to nearest against float64 loops, its grid against every other scale, and bad input."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from zreward.errors import QuantizationError
from zreward.quant.rtn import SHRINK, SMALLEST_SCALE, decode, encode, fake_quantize, grid, quantize_rtn
from zreward.quant.tensor import WeightFormat

FORMATS = [
    WeightFormat(4, 16),
    WeightFormat(4, 32, symmetric=False),
    WeightFormat(4, 0),
    WeightFormat(8, 32),
    WeightFormat(8, 0, symmetric=False),
    WeightFormat(8, 0, activations="int8"),
]


FLOAT8 = WeightFormat(8, activations="fp8-static")


def heavy_tailed(out: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, inputs, generator=generator) ** 3 * 0.02


def covering(values: NDArray[np.float64], fmt: WeightFormat, factor: float) -> tuple[float, int]:
    """Scale (as float16) and zero point that hold factor · [min, max], with 0 in the range."""
    low, high = min(values.min(), 0) * factor, max(values.max(), 0) * factor
    if fmt.symmetric:
        return float(np.float16(max(high / (fmt.middle - 1), -low / fmt.middle))), fmt.middle
    scale = float(np.float16((high - low) / fmt.max_code))
    return scale, int(np.clip(np.round(-low / scale), 0, fmt.max_code))


def nearest(values: NDArray[np.float64], fmt: WeightFormat, scale: float, zero: int) -> NDArray[np.float64]:
    return np.clip(np.round(values / scale) + zero, 0, fmt.max_code)


def error_of(
    values: NDArray[np.float64], weights: NDArray[np.float64], fmt: WeightFormat, scale: float, zero: int
) -> float:
    return float((weights * ((nearest(values, fmt, scale, zero) - zero) * scale - values) ** 2).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_without_a_search_it_is_the_plain_loop_in_float64(fmt: WeightFormat) -> None:
    weight = heavy_tailed(6, 64)
    quantized = quantize_rtn(weight, fmt, clip_search=False)
    size = fmt.group_size or 64
    for o in range(6):
        for g in range(64 // size):
            values = weight[o, g * size : (g + 1) * size].double().numpy()
            scale, zero = covering(values, fmt, 1.0)
            assert quantized.scales[o, g] == np.float32(scale)
            assert quantized.zeros[o, g] == zero
            codes = quantized.codes[o, g * size : (g + 1) * size]
            assert np.array_equal(codes, nearest(values, fmt, scale, zero))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_scale_of_the_search_has_less_error_than_the_one_chosen(fmt: WeightFormat, weighted: bool) -> None:
    weight = heavy_tailed(5, 64, seed=1)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else None
    scales, zeros = grid(weight, fmt, importance)
    shares = np.ones(64) if importance is None else importance.double().numpy()
    size = fmt.group_size or 64
    for o in range(5):
        for g in range(64 // size):
            part = slice(g * size, (g + 1) * size)
            values = weight[o, part].double().numpy()
            chosen = error_of(values, shares[part], fmt, float(scales[o, g]), int(zeros[o, g]))
            for factor in SHRINK[fmt.bits]:
                tried = error_of(values, shares[part], fmt, *covering(values, fmt, factor))
                assert chosen <= tried * (1 + 1e-4)


def test_the_search_pays_at_4_bits_on_long_normal_rows() -> None:
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    fmt = WeightFormat(4, 0)
    plain = torch.from_numpy(quantize_rtn(weight, fmt, clip_search=False).dequantized())
    searched = fake_quantize(weight, fmt)
    assert (searched - weight).square().sum() < 0.8 * (plain - weight).square().sum()


def test_importance_moves_the_error_away_from_the_inputs_that_matter() -> None:
    weight, fmt = heavy_tailed(32, 64), WeightFormat(4, 0)
    importance = torch.ones(64)
    importance[:8] = 100.0
    even, uneven = fake_quantize(weight, fmt), fake_quantize(weight, fmt, importance)
    assert (uneven - weight)[:, :8].square().sum() < 0.7 * (even - weight)[:, :8].square().sum()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 2**32 - 1),
    st.floats(-30, 12, allow_nan=False).map(lambda e: 2.0**e),
)
def test_scales_are_float16_and_every_weight_is_within_half_a_step_or_clipped(
    fmt: WeightFormat, seed: int, size: float
) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * size
    quantized = quantize_rtn(weight, fmt)
    assert np.array_equal(quantized.scales, quantized.scales.astype(np.float16).astype(np.float32))
    assert (quantized.scales >= SMALLEST_SCALE).all()
    steps = np.repeat(quantized.scales, 32 // quantized.scales.shape[1], axis=1)
    within = np.abs(quantized.dequantized() - weight.numpy()) <= steps * 0.5 * (1 + 1e-4)
    at_the_end = (quantized.codes == 0) | (quantized.codes == fmt.max_code)
    assert (within | at_the_end).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_groups_of_zeros_stay_zero_with_a_small_positive_scale(fmt: WeightFormat) -> None:
    weight = heavy_tailed(4, 64)
    weight[1] = 0
    weight[2, :32] = 0
    quantized = quantize_rtn(weight, fmt, importance=torch.zeros(64))
    assert (quantized.scales > 0).all()
    assert quantized.scales[1].max() == SMALLEST_SCALE
    assert not quantized.dequantized()[1].any()
    assert not quantized.dequantized()[2, :32].any()


def test_a_matrix_larger_than_a_block_of_rows_is_the_same_as_its_rows_alone() -> None:
    weight, fmt = heavy_tailed(300, 8192), WeightFormat(4, 128, symmetric=False)
    together = quantize_rtn(weight, fmt)
    for rows in (slice(0, 3), slice(126, 131), slice(297, 300)):
        alone = quantize_rtn(weight[rows], fmt)
        assert np.array_equal(together.codes[rows], alone.codes)
        assert np.array_equal(together.scales[rows], alone.scales)


def test_codes_of_another_grid_and_bfloat16_weights() -> None:
    weight, fmt = heavy_tailed(4, 32).bfloat16(), WeightFormat(8, 16)
    scales, zeros = grid(weight.float(), fmt)
    values = decode(encode(weight, fmt, scales, zeros), scales, zeros, fmt)
    assert np.array_equal(values.numpy(), quantize_rtn(weight, fmt).dequantized())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 20, allow_nan=False).map(lambda e: 2.0**e))
def test_floats_of_8_bits_are_the_nearest_and_none_is_cut(seed: int, size: float) -> None:
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) * size
    weight[1, 4] = 0
    quantized = quantize_rtn(weight, FLOAT8)
    scales, largest = quantized.scales[:, 0], weight.abs().amax(1).numpy()
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    assert (scales * 448 >= largest).all()
    smaller = np.nextafter(scales.astype(np.float16), np.float16(0)).astype(np.float32)
    assert ((smaller * 448 < largest) | (scales == SMALLEST_SCALE)).all()
    expected = (weight.numpy() / scales[:, None]).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(quantized.codes, expected.view(np.uint8))
    values = expected.astype(np.float32) * scales[:, None]
    assert np.array_equal(quantized.dequantized(), values)
    assert np.array_equal(fake_quantize(weight, FLOAT8).numpy(), values)
    assert not quantized.zeros.any()


def test_floats_of_8_bits_are_refused_where_their_scale_is_beyond_float16() -> None:
    weight = heavy_tailed(4, 32)
    weight[0, 0] = 65504.0 * 449
    with pytest.raises(QuantizationError, match="beyond float16"):
        quantize_rtn(weight, FLOAT8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = heavy_tailed(4, 32)
    weight[2, 7] = bad
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_rtn(weight, WeightFormat(4, 16))


def test_finite_weights_whose_sum_overflows_are_not_called_nan() -> None:
    with pytest.raises(QuantizationError, match="beyond float16"):
        quantize_rtn(torch.full((4, 32), 3e38), WeightFormat(4, 16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_that_need_a_scale_beyond_float16_are_refused(symmetric: bool) -> None:
    weight = heavy_tailed(4, 32)
    weight[0, 0] = 70000.0 * 15
    with pytest.raises(QuantizationError, match=r"as large as 1\.05e\+06"):
        quantize_rtn(weight, WeightFormat(4, 16, symmetric=symmetric))


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(31), r"shape \[31\]; it must be \[32\]"),
        (-torch.ones(32), "negative"),
        (torch.full((32,), float("nan")), "NaN"),
    ],
)
def test_bad_importance_is_refused(importance: torch.Tensor, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_rtn(heavy_tailed(4, 32), WeightFormat(4, 16), importance)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(QuantizationError, match="does not divide 48"):
        quantize_rtn(heavy_tailed(4, 48), WeightFormat(4, 32))
    with pytest.raises(QuantizationError, match=r"a matrix \[out, in\]"):
        quantize_rtn(torch.ones(32), WeightFormat(4, 16))
    with pytest.raises(QuantizationError, match="never made"):
        quantize_rtn(heavy_tailed(4, 32), WeightFormat(4, 16, act_order=True))
