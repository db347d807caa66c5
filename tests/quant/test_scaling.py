"""Scales per channel, the runtime's activation quantization, and outlier statistics."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from zreward.errors import QuantizationError
from zreward.quant.ranges import fake_quantize_static, static_scale
from zreward.quant.rtn import fake_quantize
from zreward.quant.scaling import (
    SCALE_LIMIT,
    fake_quantize_rows,
    fake_quantize_tensor,
    outlier_statistics,
    output_error,
    search_scales,
    smoothing_scales,
)
from zreward.quant.tensor import WeightFormat

INT8 = WeightFormat(8, activations="int8")


def rows_with_loud_channels(rows: int = 200, inputs: int = 64, loudness: float = 60.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    x[:, 5] *= loudness
    x[:, 40] *= loudness / 2
    return x


def matrix(out: int, inputs: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def dynamic_quantize_linear() -> ort.InferenceSession:
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])],
        [
            helper.make_tensor_value_info("y", TensorProto.UINT8, [None, None]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("zero", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_rows_are_rounded_as_the_graph_rounds_them(shift: float) -> None:
    """Against ONNX Runtime's QuantizeLinear with a scale per row and the zero point 128."""
    x = rows_with_loud_channels() * torch.logspace(-3, 3, 200)[:, None] + shift
    x[7] = 0
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], axis=0)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, [None]),
            helper.make_tensor_value_info("zero", TensorProto.UINT8, [None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = x.abs().amax(1)
    scale = (torch.where(largest > 0, largest, 1) / 127).numpy()
    zero = np.full(200, 128, np.uint8)
    (codes,) = session.run(None, {"x": x.numpy(), "scale": scale, "zero": zero})
    expected = (codes.astype(np.float32) - 128) * scale[:, None]
    np.testing.assert_allclose(fake_quantize_rows(x).numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lowest", [-0.9, -0.3, -0.02, 0.0, 0.2])
def test_one_sided_ranges_are_those_of_onnxruntime(
    lowest: float, dynamic_quantize_linear: ort.InferenceSession
) -> None:
    x = lowest + (1 - lowest) * torch.rand(20, 16, generator=torch.Generator().manual_seed(0))
    x[0, :2] = torch.tensor([lowest, 1.0])
    codes, scale, zero = dynamic_quantize_linear.run(None, {"x": x.numpy()})
    expected = (codes.astype(np.float32) - np.float32(zero)) * scale
    np.testing.assert_allclose(fake_quantize_tensor(x).numpy(), expected, rtol=1e-6, atol=0)


def test_activation_quantization_keeps_shape_and_type_and_zeros() -> None:
    x = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    x[1, 2] = torch.arange(8)
    fake = fake_quantize_rows(x)
    assert fake.shape == x.shape
    assert fake.dtype == torch.bfloat16
    assert not fake[0].any()
    assert torch.equal(fake_quantize_rows(torch.zeros(0, 8)), torch.zeros(0, 8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_each_row_is_off_by_at_most_one_step_of_its_own_range(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator) * 10 ** (torch.rand(rows, 1, generator=generator) * 12 - 6)
    step = x.abs().amax(1, keepdim=True) * 2 / 255
    assert ((fake_quantize_rows(x) - x).abs() <= step * 1.001).all()


def smoothquant(absmax: NDArray[np.float64], weights: list[torch.Tensor], alpha: float) -> list[float]:
    scales = []
    for j in range(len(absmax)):
        column = max(abs(float(w[o, j])) for w in weights for o in range(len(w)))
        scales.append(absmax[j] ** alpha / column ** (1 - alpha))
    mean = np.exp(np.mean(np.log(scales)))
    return [scale / mean for scale in scales]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_smoothing_scales_are_equation_4_up_to_a_factor(alpha: float) -> None:
    absmax, weights = rows_with_loud_channels().abs().amax(0), [matrix(8), matrix(4, seed=2)]
    expected = smoothquant(absmax.double().numpy(), weights, alpha)
    np.testing.assert_allclose(smoothing_scales(absmax, weights, alpha).numpy(), expected, rtol=1e-4)


def test_alpha_0_is_no_scaling() -> None:
    assert torch.equal(smoothing_scales(torch.rand(64), [matrix(4)], 0), torch.ones(64))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_dead_channels_have_scale_1_and_extreme_ones_stay_in_range(alpha: float) -> None:
    absmax, weight = torch.full((64,), 1.0), matrix(4)
    absmax[0], absmax[1], absmax[2] = 0, 1e30, 1e-30
    weight[:, 3] = 0
    scales = smoothing_scales(absmax, [weight], alpha)
    assert scales[0] == scales[3] == 1
    assert (scales >= 1 / SCALE_LIMIT).all()
    assert (scales <= SCALE_LIMIT).all()
    assert torch.equal(smoothing_scales(torch.zeros(64), [weight], alpha), torch.ones(64))


def test_the_layer_is_unchanged_by_scaling_without_quantization() -> None:
    x, weight = rows_with_loud_channels(), matrix(16)
    scales = smoothing_scales(x.abs().amax(0), [weight], 0.7)
    assert output_error(x, [weight], [None])(scales) < 1e-10


@pytest.mark.parametrize("fmt", [INT8, WeightFormat(4, 32), WeightFormat(4, 32, symmetric=False)], ids=str)
def test_the_search_finds_scales_that_halve_the_error_of_loud_channels(fmt: WeightFormat) -> None:
    x, weights = rows_with_loud_channels(), [matrix(32), matrix(16, seed=3)]
    evaluate = output_error(x, weights, [fmt, fmt])
    choice = search_scales(x.abs().amax(0), weights, evaluate)
    assert choice.alpha > 0
    assert choice.errors[choice.alpha] == min(choice.errors.values()) == evaluate(choice.scales)
    assert choice.errors[choice.alpha] < 0.5 * choice.errors[0.0]


def test_output_error_is_the_error_of_the_product_that_runs() -> None:
    """W8A8 in float64, with weights rounded here."""
    x, weight = rows_with_loud_channels(rows=50), matrix(8)
    scales = smoothing_scales(x.abs().amax(0), [weight], 0.5)
    reads = fake_quantize_rows(x / scales).double().numpy()
    stored = (weight * scales).double().numpy()
    step = np.maximum(stored.max(1) / 127, stored.min(1) / -128)[:, None]
    plain = np.round(stored / step) * step
    output = x.double().numpy() @ weight.double().numpy().T
    expected = ((reads @ plain.T - output) ** 2).sum() / (output**2).sum()
    # The clip search may round better than `plain` does.
    assert output_error(x, [weight], [INT8])(scales) == pytest.approx(expected, rel=0.3)


def test_output_error_rounds_inputs_on_one_grid_where_the_format_does() -> None:
    x, weight = rows_with_loud_channels(rows=50), matrix(8)
    static, by_row = (WeightFormat(8, activations=kind) for kind in ("int8-static", "int8"))
    ones = torch.ones(x.shape[1])
    coarse, fine = (output_error(x, [weight], [chosen])(ones) for chosen in (static, by_row))
    read = fake_quantize_static(x, static_scale(x))
    stored = fake_quantize(weight, static, x.square().mean(0))
    output = x @ weight.T
    expected = float((read @ stored.T - output).square().sum() / output.square().sum())
    assert coarse == pytest.approx(expected, rel=1e-3)
    assert coarse > fine


def test_no_scaling_takes_part_and_wins_ties() -> None:
    x, weight = rows_with_loud_channels(), matrix(8)
    constant = search_scales(x.abs().amax(0), [weight], lambda scales: 1.0, alphas=(0.5, 0.3))
    assert constant.alpha == 0
    assert torch.equal(constant.scales, torch.ones(64))
    assert list(constant.errors) == [0.0, 0.5, 0.3]


def test_outlier_statistics_of_known_inputs() -> None:
    x = torch.ones(101, 4)
    x[:, 1] = 3.0
    x[50] *= 100
    found = outlier_statistics(x.reshape(1, 101, 4))
    assert found.absmax == 300
    assert found.row_ratio == 100
    assert found.channel_ratio == pytest.approx(3 / 1.5)
    assert found.channel_kurtosis == pytest.approx((81 + 3) / 4 / (12 / 4) ** 2)
    assert found.tensor_error == pytest.approx(
        float((fake_quantize_tensor(x) - x).square().sum() / x.square().sum())
    )
    assert found.row_error < 1e-4


def test_one_loud_row_ruins_a_scale_per_tensor_but_not_a_scale_per_row() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    quiet = outlier_statistics(x)
    x[3, 3] = 1000
    loud = outlier_statistics(x)
    assert loud.row_ratio > 100 * quiet.row_ratio
    assert (fake_quantize_tensor(x) - x)[4:].square().mean() > 0.3 * x[4:].square().mean()
    assert (fake_quantize_rows(x) - x)[4:].square().mean() < 1e-3 * x[4:].square().mean()


def test_statistics_of_zeros_and_of_nothing() -> None:
    mostly_zeros = torch.cat([torch.zeros(9, 8), torch.ones(2, 8)])
    assert outlier_statistics(mostly_zeros).row_ratio == 1
    zeros = outlier_statistics(torch.zeros(3, 8))
    assert (zeros.row_ratio, zeros.channel_ratio, zeros.channel_kurtosis, zeros.row_error) == (1, 1, 1, 0)
    for bad in (torch.zeros(0, 8), torch.full((2, 8), float("nan"))):
        with pytest.raises(QuantizationError, match="empty, or hold NaN"):
            outlier_statistics(bad)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(QuantizationError, match="not between 0 and 1"):
        smoothing_scales(torch.ones(64), [matrix(4)], alpha)


def test_bad_input_is_refused() -> None:
    with pytest.raises(QuantizationError, match="do not all read the 64 inputs"):
        smoothing_scales(torch.ones(64), [matrix(4), matrix(4, 32)], 0.5)
    with pytest.raises(QuantizationError, match="do not all read"):
        smoothing_scales(torch.ones(64), [], 0.5)
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        smoothing_scales(torch.full((64,), float("inf")), [matrix(4)], 0.5)
    with pytest.raises(QuantizationError, match="output error is NaN"):
        search_scales(torch.ones(64), [matrix(4)], lambda scales: float("nan"))
