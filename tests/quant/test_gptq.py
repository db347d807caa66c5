"""GPTQ against a float64 implementation that goes column by column, and what its refinement guarantees."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from zreward.errors import QuantizationError
from zreward.quant import gptq
from zreward.quant.gptq import HessianAccumulator, proxy_error, quantize_gptq
from zreward.quant.rtn import grid, quantize_rtn
from zreward.quant.tensor import WeightFormat

FORMATS = [
    WeightFormat(4, 16),
    WeightFormat(4, 32, symmetric=False),
    WeightFormat(4, 0),
    WeightFormat(8, 0),
    WeightFormat(8, 32, symmetric=False),
]


FLOAT8 = WeightFormat(8, activations="fp8-static")


def problem(
    out: int = 24, inputs: int = 64, rows: int = 500, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the mean of x xᵀ of strongly correlated inputs with uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, inputs // 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(inputs // 4, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    channels = torch.linspace(0.2, 3.0, inputs)[torch.randperm(inputs, generator=generator)]
    x = (hidden @ mixing / 4 + 0.3 * noise) * channels
    return torch.randn(out, inputs, generator=generator) * 0.05, x.T @ x / rows


def column_by_column(
    weight: torch.Tensor, hessian: torch.Tensor, fmt: WeightFormat, damping: float, act_order: bool
) -> NDArray[np.uint8]:
    """Optimal brain quantization in a fixed order: the inverse is updated after each column, as the paper's
    equations 2 and 3 have it, instead of a Cholesky factor."""
    W, H = weight.double().numpy().copy(), hessian.double().numpy().copy()
    mean = H.diagonal().mean()
    H += damping * mean * np.eye(len(H))
    scales, zeros = grid(weight, fmt, torch.from_numpy(H.diagonal() / mean))
    size = fmt.group_size or len(H)
    order = np.argsort(-H.diagonal(), kind="stable") if act_order else np.arange(len(H))
    inverse, codes = np.linalg.inv(H), np.zeros(W.shape, np.uint8)
    for i in order:
        s, z = scales[:, i // size].double().numpy(), zeros[:, i // size].double().numpy()
        codes[:, i] = np.clip(np.round(W[:, i] / s) + z, 0, fmt.max_code)
        error = (W[:, i] - (codes[:, i] - z) * s) / inverse[i, i]
        W -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_equal_the_float64_reference(fmt: WeightFormat, act_order: bool) -> None:
    weight, hessian = problem()
    quantized = quantize_gptq(
        weight, hessian, fmt, damping=0.02, act_order=act_order, block=24, refine_passes=0
    )
    assert np.array_equal(quantized.codes, column_by_column(weight, hessian, fmt, 0.02, act_order))


@pytest.mark.parametrize(("bits", "factor"), [(4, 2.0), (8, 2.0)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16])
def test_the_proxy_error_is_less_than_half_of_round_to_nearest(
    bits: int, factor: float, symmetric: bool, group: int
) -> None:
    weight, hessian = problem(seed=3)
    fmt = WeightFormat(bits, group, symmetric)
    rtn = quantize_rtn(weight, fmt, hessian.diagonal())
    assert proxy_error(weight, quantize_gptq(weight, hessian, fmt), hessian) * factor < proxy_error(
        weight, rtn, hessian
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_inputs_without_correlation_give_round_to_nearest(fmt: WeightFormat) -> None:
    weight, _ = problem()
    quantized, rtn = quantize_gptq(weight, torch.eye(64), fmt, refine_passes=0), quantize_rtn(weight, fmt)
    assert np.array_equal(quantized.codes, rtn.codes)
    assert np.array_equal(quantized.scales, rtn.scales)


def test_floats_of_8_bits_round_each_input_after_the_errors_before_it() -> None:
    """Against the paper's equations with a cast in place of a grid; then refined."""
    weight, hessian = problem()
    quantized = quantize_gptq(weight, hessian, FLOAT8, damping=0.02, block=24, refine_passes=0)
    W, H = weight.double().numpy().copy(), hessian.double().numpy().copy()
    H += 0.02 * H.diagonal().mean() * np.eye(len(H))
    inverse, scales = np.linalg.inv(H), quantized.scales[:, 0].astype(np.float64)
    assert np.array_equal(scales * 448 >= np.abs(weight.numpy()).max(1), np.ones(len(scales), bool))
    for i in np.argsort(-H.diagonal(), kind="stable"):
        nearest = (W[:, i] / scales).clip(-448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        assert np.array_equal(quantized.codes[:, i], nearest.view(np.uint8))
        W -= np.outer((W[:, i] - nearest.astype(np.float64) * scales) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    plain = proxy_error(weight, quantize_rtn(weight, FLOAT8), hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    errors = [
        proxy_error(weight, quantize_gptq(weight, hessian, FLOAT8, refine_passes=n), damped) for n in range(4)
    ]
    assert errors[0] < 0.6 * plain
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[3] < errors[0]


def test_only_the_direction_of_the_hessian_matters() -> None:
    weight, hessian = problem()
    first, second = (quantize_gptq(weight, h, WeightFormat(4, 16)) for h in (hessian, hessian * 2048))
    assert np.array_equal(first.codes, second.codes)


def test_rows_are_independent_and_the_block_size_does_not_matter() -> None:
    weight, hessian = problem(out=20)
    together = quantize_gptq(weight, hessian, WeightFormat(4, 32), block=128, refine_passes=2)
    alone = quantize_gptq(weight[5:6], hessian, WeightFormat(4, 32), block=7, refine_passes=2)
    assert np.array_equal(together.codes[5:6], alone.codes)
    assert np.array_equal(together.scales[5:6], alone.scales)


def test_visiting_the_loudest_inputs_first_helps() -> None:
    ratios = []
    for seed in range(5):
        weight, hessian = problem(seed=seed)
        errors = [
            proxy_error(weight, quantize_gptq(weight, hessian, WeightFormat(4, 16), act_order=a), hessian)
            for a in (False, True)
        ]
        ratios.append(errors[1] / errors[0])
    assert np.mean(ratios) < 1


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_refinement_pass_raises_the_damped_proxy_error(fmt: WeightFormat) -> None:
    weight, hessian = problem(seed=1)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    errors = [
        proxy_error(weight, quantize_gptq(weight, hessian, fmt, refine_passes=n), damped) for n in range(5)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < (0.97 if fmt.bits == 4 else 1) * errors[0]


def test_after_refinement_no_single_code_can_be_improved() -> None:
    weight, hessian = problem(out=3, inputs=32, seed=2)
    fmt = WeightFormat(4, 16)
    quantized = quantize_gptq(weight, hessian, fmt, refine_passes=50)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)).numpy()
    codes, best = quantized.codes.astype(np.int64), quantized.dequantized().astype(np.float64)
    steps = np.repeat(quantized.scales.astype(np.float64), 16, axis=1)

    def error(row: int, values: NDArray[np.float64]) -> float:
        difference = values - weight[row].double().numpy()
        return float(difference @ damped @ difference)

    for o in range(3):
        reached = error(o, best[o])
        for i in range(32):
            for code in {max(codes[o, i] - 1, 0), min(codes[o, i] + 1, 15)}:
                other = best[o].copy()
                other[i] = (code - 8) * steps[o, i]
                assert error(o, other) >= reached * (1 - 1e-6)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
def test_fitted_scales_equal_a_float64_loop_over_groups(fmt: WeightFormat) -> None:
    """A parabola in each scale; its vertex as float16, taken where that lowers the error."""
    weight, hessian = problem(out=4, seed=5)
    quantized = quantize_rtn(weight, fmt)
    codes, scales, zeros = (
        torch.from_numpy(a) for a in (quantized.codes, quantized.scales, quantized.zeros.astype(np.float32))
    )
    fitted = gptq._fitted_scales(weight, hessian, codes, scales, zeros, fmt)
    H, size = hessian.numpy(), fmt.group_size or 64
    for o in range(4):
        levels = codes[o].double().numpy() - np.repeat(zeros[o].double().numpy(), size)
        values = levels * np.repeat(scales[o].double().numpy(), size)
        for g in range(64 // size):
            c = np.zeros(64)
            c[g * size : (g + 1) * size] = levels[g * size : (g + 1) * size]
            old = float(scales[o, g])
            difference = values - weight[o].double().numpy()
            new = float(np.float16(old - c @ H @ difference / (c @ H @ c)))
            moved = difference + (new - old) * c
            if moved @ H @ moved < difference @ H @ difference:
                values += (new - old) * c
                old = new
            assert float(fitted[o, g]) == old
    assert not torch.equal(fitted, scales)


def test_float32_arithmetic_of_large_layers_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    double = quantize_gptq(weight, hessian, WeightFormat(4, 16), refine_passes=2)
    monkeypatch.setattr(gptq, "DOUBLE_UP_TO", 16)
    single = quantize_gptq(weight, hessian.float(), WeightFormat(4, 16), refine_passes=2)
    assert proxy_error(weight, single, hessian) < 1.02 * proxy_error(weight, double, hessian)


def test_inputs_that_were_never_excited_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    dead = [0, 17, 63]
    hessian[dead] = 0
    hessian[:, dead] = 0
    quantized = quantize_gptq(weight, hessian, WeightFormat(8, 0), damping=0.0, refine_passes=1)
    error = np.abs(quantized.dequantized() - weight.numpy())[:, dead]
    clipped = np.isin(quantized.codes[:, dead], (0, 255))
    assert (clipped | (error <= quantized.scales * 0.501)).all()
    assert clipped.mean() < 0.1


def test_inputs_that_were_never_excited_change_nothing_for_the_others() -> None:
    weight, hessian = problem(inputs=48)
    live = torch.tensor([i for i in range(52) if i not in (0, 17, 40, 51)])
    wider, larger = torch.zeros(len(weight), 52), torch.zeros(52, 52, dtype=torch.float64)
    wider[:, live] = weight
    larger[live[:, None], live] = hessian
    alone = quantize_gptq(weight, hessian, WeightFormat(8, 0), damping=0.0, refine_passes=0)
    among = quantize_gptq(wider, larger, WeightFormat(8, 0), damping=0.0, refine_passes=0)
    assert np.array_equal(among.scales, alone.scales)
    assert np.array_equal(among.codes[:, live.numpy()], alone.codes)


def test_a_hessian_of_zeros_gives_round_to_nearest() -> None:
    weight, _ = problem()
    quantized = quantize_gptq(weight, torch.zeros(64, 64), WeightFormat(4, 16), refine_passes=1)
    assert np.array_equal(quantized.codes, quantize_rtn(weight, WeightFormat(4, 16)).codes)


def test_damping_is_raised_until_the_hessian_can_be_factored() -> None:
    weight, hessian = problem()
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.001 * hessian.diagonal().mean()  # as rounding can leave it
    bent = vectors @ torch.diag(values) @ vectors.T
    quantized = quantize_gptq(weight, bent, WeightFormat(8, 0), damping=0.0, refine_passes=1)
    assert np.isfinite(quantized.dequantized()).all()
    hopeless = torch.full((64, 64), 5.0).fill_diagonal_(1.0)
    with pytest.raises(QuantizationError, match="not positive definite"):
        quantize_gptq(weight, hopeless, WeightFormat(8, 0))


def test_bad_input_is_refused() -> None:
    weight, hessian = problem()
    fmt = WeightFormat(4, 16)
    with pytest.raises(QuantizationError, match=r"must be \[64, 64\]"):
        quantize_gptq(weight, hessian[:32, :32], fmt)
    for bad in (float("nan"), float("inf"), -1.0):
        broken = hessian.clone()
        broken[3, 3] = bad
        with pytest.raises(QuantizationError, match="Hessian holds"):
            quantize_gptq(weight, broken, fmt)
    weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="NaN"):
        quantize_gptq(weight, hessian, fmt)


@pytest.mark.parametrize("double_up_to", [16, 2048])
def test_the_accumulator_is_the_mean_of_outer_products(
    double_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "DOUBLE_UP_TO", double_up_to)
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(3, 7, 24, generator=generator), torch.rand(3, 7, generator=generator) > 0.4
    accumulator = HessianAccumulator(24)
    accumulator.add(x[:1], mask[:1])
    accumulator.add(x[1:], mask[1:])
    rows = x[mask].double().numpy()
    expected = np.stack([np.outer(row, row) for row in rows]).mean(0)
    assert accumulator.count == len(rows)
    assert accumulator.hessian.dtype == (torch.float32 if double_up_to == 16 else torch.float64)
    np.testing.assert_allclose(accumulator.hessian.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(accumulator.mean_square.numpy(), expected.diagonal(), rtol=1e-5)
    np.testing.assert_allclose(accumulator.absmax.numpy(), np.abs(rows).max(0), rtol=1e-6)


def test_a_row_of_weight_two_counts_as_two_rows() -> None:
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    weighted, repeated = HessianAccumulator(24), HessianAccumulator(24)
    weighted.add(x, torch.tensor([1.0, 2.0, 0.0, 0.5]))
    repeated.add(x[[0, 0, 1, 1, 1, 1, 3]])
    torch.testing.assert_close(weighted.hessian, repeated.hessian, rtol=1e-6, atol=1e-9)


def test_the_accumulator_refuses_what_is_not_finite_only_where_it_counts() -> None:
    x = torch.zeros(2, 24)
    x[1, 3] = float("nan")
    accumulator = HessianAccumulator(24)
    accumulator.add(x, torch.tensor([True, False]))
    with pytest.raises(QuantizationError, match="NaN"):
        accumulator.add(x)
    assert accumulator.count == 1
    with pytest.raises(QuantizationError, match="do not fit 24 inputs"):
        accumulator.add(torch.zeros(2, 23))
    with pytest.raises(QuantizationError, match="do not fit"):
        accumulator.add(torch.zeros(2, 24), torch.ones(3))
    with pytest.raises(QuantizationError, match="no calibration rows"):
        _ = HessianAccumulator(24).hessian
