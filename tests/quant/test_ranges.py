"""Static scales: near the best of all scales, by the error that they leave."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from zreward.errors import QuantizationError
from zreward.quant.float8 import LARGEST
from zreward.quant.ranges import STATIC_CODES, MagnitudeHistogram, fake_quantize_static, static_scale


def inputs(seed: int, *, outlier: float = 0.0) -> torch.Tensor:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[0, 0] = outlier
    return x


def error(x: torch.Tensor, scale: float) -> float:
    return float((fake_quantize_static(x, scale) - x).square().sum())


@pytest.mark.parametrize("spread", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("outlier", [0.0, 8.0, 1000.0])
def test_no_other_scale_is_much_better(spread: float, outlier: float) -> None:
    x = spread * inputs(1, outlier=outlier)
    candidates = float(x.abs().max()) / STATIC_CODES * np.geomspace(1 / 300, 1.2, 400)
    best = min(error(x, float(scale)) for scale in candidates)
    assert error(x, static_scale(x)) < 1.15 * best


def test_rounding_is_that_of_quantize_linear() -> None:
    x = torch.tensor([[0.0, 0.24, 0.26, -0.25, 0.75, 63.4, 63.6, 900.0, -900.0]])
    expected = [0.0, 0.0, 0.5, -0.0, 1.0, 63.5, 63.5, 63.5, -64.0]
    assert fake_quantize_static(x, 0.5).tolist() == [expected]
    assert fake_quantize_static(x.to(torch.bfloat16), 0.5).dtype is torch.bfloat16


def test_floats_of_8_bits_reach_to_the_largest_value() -> None:
    x = 300 * inputs(4, outlier=8.0)
    scale = static_scale(x, "fp8-static")
    assert scale == float(x.abs().max()) / LARGEST
    read = fake_quantize_static(x, scale, "fp8-static")
    nearest = (x.numpy() / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(read.numpy(), nearest * np.float32(scale))
    assert float((read - x).square().sum() / x.square().sum()) < 1e-3
    beyond = fake_quantize_static(torch.tensor([1e6, -1e6]), 0.5, "fp8-static")
    assert beyond.tolist() == [224.0, -224.0]
    assert 0 < static_scale(torch.zeros(3, 4), "fp8-static") < 1
    with pytest.raises(QuantizationError, match="no calibration rows"):
        MagnitudeHistogram().scale_for("fp8-static")


def test_an_outlier_in_a_token_that_does_not_matter_is_cut() -> None:
    x = inputs(2)
    plain = static_scale(x)
    x[3] *= 1000
    weights = torch.ones(len(x))
    assert static_scale(x) > 5 * plain
    weights[3] = 1e-9
    found = MagnitudeHistogram()
    found.add(x, weights)
    assert found.scale == pytest.approx(plain, rel=0.1)


def test_batches_add_up_and_masked_rows_do_not_count() -> None:
    x = inputs(3)
    whole, parts = MagnitudeHistogram(), MagnitudeHistogram()
    whole.add(x)
    for part in x.split(70):
        mask = torch.ones(len(part) + 1, dtype=torch.bool)
        mask[-1] = False
        parts.add(torch.cat([part, torch.full((1, 64), float("nan"))]), mask)
    assert parts.scale == whole.scale


def test_inputs_of_zeros_have_some_scale() -> None:
    assert 0 < static_scale(torch.zeros(3, 4)) < 1


def test_no_rows_and_infinite_rows_are_errors() -> None:
    with pytest.raises(QuantizationError, match="no calibration rows"):
        _ = MagnitudeHistogram().scale
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        MagnitudeHistogram().add(torch.tensor([[1.0, float("inf")]]))
