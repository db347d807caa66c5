"""Scales per input channel that make weights or activations easier to quantize, and the activation format itself.

A layer computes x Wᵀ = (x / s)(W s)ᵀ for any positive s, one value per input. Large s take outliers out of the
activations and into the weights (SmoothQuant), and give channels that carry much a finer share of the weights'
grid (AWQ). How far to go is searched: the error of the layer's output on samples decides, and s = 1 takes part,
so scaling is never chosen where it hurts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zreward.errors import QuantizationError
from zreward.quant.ranges import fake_quantize_static, static_scale
from zreward.quant.rtn import fake_quantize
from zreward.quant.tensor import WeightFormat

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Migration strengths that are tried; SmoothQuant's default is 0.5, and 0 leaves the layer as it is."""

SCALE_LIMIT = 1e4
"""Scales stay between 1 / limit and limit, so that folding them costs float32 no digits."""

_ACTIVATION_LEVELS = 255


@dataclass(frozen=True)
class ScaleChoice:
    """What a search found.

    Attributes:
        alpha: the migration strength; 0: no scaling.
        scales: float32 [in]; ones for alpha 0.
        errors: what `evaluate` gave for each alpha, in the order they were tried.
    """

    alpha: float
    scales: Tensor
    errors: dict[float, float]


@dataclass(frozen=True)
class OutlierStatistics:
    """How unevenly the inputs of a layer are spread. Ratios are 1 where all are alike.

    Attributes:
        absmax: the largest magnitude.
        row_ratio: that, over the median of the rows' largest magnitudes, rows of zeros left out: what a scale per
            tensor loses.
        channel_ratio: the largest of the channels' root mean squares over their mean: what smoothing can gain.
        channel_kurtosis: fourth moment of the channels' root mean squares over the second moment squared.
        tensor_error: relative squared error of uint8 with one scale for the tensor.
        row_error: relative squared error of uint8 with a scale per row.
    """

    absmax: float
    row_ratio: float
    channel_ratio: float
    channel_kurtosis: float
    tensor_error: float
    row_error: float


def smoothing_scales(activation_absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|x_j|^α / max|W_j|^(1−α) (SmoothQuant, Xiao et al. 2023, equation 4), with geometric mean 1.

    Args:
        activation_absmax: [in], the largest magnitude of each input.
        weights: matrices [out, in] that read this input.
        alpha: 0 to 1. At 0 the result is ones, no scaling, where equation 4 would level the weights.

    Returns:
        float32 [in], positive; 1 for inputs that are never excited or never read.

    Raises:
        QuantizationError: alpha outside 0 to 1, shapes that do not fit, NaN or infinity.
    """
    inputs = len(activation_absmax)
    if not 0 <= alpha <= 1:
        raise QuantizationError(f"migration strength {alpha} is not between 0 and 1")
    if not weights or any(weight.shape[1:] != (inputs,) for weight in weights):
        shapes = [list(weight.shape) for weight in weights]
        raise QuantizationError(f"weights {shapes} do not all read the {inputs} inputs that have statistics")
    activations = activation_absmax.to(torch.float32)
    columns = torch.stack([w.detach().abs().amax(0).to(activations) for w in weights]).amax(0)
    if not bool((torch.isfinite(activations) & torch.isfinite(columns)).all()):
        raise QuantizationError("the statistics or weights to smooth hold NaN or infinity")
    alive = (activations > 0) & (columns > 0)
    if alpha == 0 or not bool(alive.any()):
        return torch.ones_like(activations)
    logs = torch.where(alive, alpha * activations.log() - (1 - alpha) * columns.log(), 0)
    logs = torch.where(alive, logs - logs[alive].mean(), 0)
    return logs.exp().clamp_(1 / SCALE_LIMIT, SCALE_LIMIT)


def search_scales(
    statistics: Tensor,
    weights: Sequence[Tensor],
    evaluate: Callable[[Tensor], float],
    alphas: Sequence[float] = ALPHAS,
) -> ScaleChoice:
    """The migration strength with the least error; no scaling is always tried, and wins ties.

    Args:
        statistics: [in], the largest magnitude of each input.
        weights: matrices [out, in] that read this input.
        evaluate: the error with given scales [in], such as `output_error`.
        alphas: strengths to try besides 0.

    Raises:
        QuantizationError: as in `smoothing_scales`, or an error that is NaN without scaling.
    """
    choice = smoothing_scales(statistics, weights, 0)
    errors = {0.0: evaluate(choice)}
    if errors[0.0] != errors[0.0]:
        raise QuantizationError("the output error is NaN; the samples or weights are damaged")
    best = 0.0
    for alpha in alphas:
        if alpha in errors:
            continue
        scales = smoothing_scales(statistics, weights, alpha)
        errors[alpha] = evaluate(scales)
        if errors[alpha] < errors[best]:
            best, choice = alpha, scales
    return ScaleChoice(best, choice, errors)


def output_error(
    samples: Tensor, weights: Sequence[Tensor], formats: Sequence[WeightFormat | None]
) -> Callable[[Tensor], float]:
    """The function that `search_scales` minimises: squared error of the outputs, relative, summed over matrices.

    Weights are rounded to nearest with the clip search; inputs are quantized as the format says.

    Args:
        samples: [rows, in], inputs of the layer.
        weights: matrices [out, in].
        formats: of each matrix; None: not quantized.
    """
    samples = samples.detach().to(torch.float32)
    matrices = [weight.detach().to(torch.float32) for weight in weights]
    outputs = [samples @ weight.T for weight in matrices]

    def evaluate(scales: Tensor) -> float:
        inputs = samples / scales
        reads = {kind: fake_quantize_inputs(inputs, kind) for kind in _activations(formats)}
        importance = inputs.square().mean(0)
        error = 0.0
        for weight, output, chosen in zip(matrices, outputs, formats, strict=True):
            scaled = weight * scales
            if chosen is not None:
                scaled = fake_quantize(scaled, chosen, importance)
            read = inputs if chosen is None else reads[chosen.activations]
            square = float(output.square().sum())
            error += float((read @ scaled.T - output).square().sum()) / (square or 1.0)
        return error

    return evaluate


def fake_quantize_inputs(x: Tensor, activations: str) -> Tensor:
    """What a product reads in place of x [..., in], see `WeightFormat.activations`; a static scale is that of x."""
    if activations == "float":
        return x
    if activations == "int8":
        return fake_quantize_rows(x)
    return fake_quantize_static(x, static_scale(x, activations), activations)


def fake_quantize_rows(x: Tensor) -> Tensor:
    """What the runtime's 8-bit product reads in place of x.

    Each row has a scale of its own, its largest magnitude over 127, and codes around a fixed zero point
    (`zreward.export.passes.quantized_products`). Rows of zeros stay zeros.

    Args:
        x: [..., in], any float type and device.

    Returns:
        The same shape, type and device.
    """
    rows = x.detach().to(torch.float32)
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1) / 127
    return ((rows / scale).round_() * scale).to(x.dtype)


def fake_quantize_blocks(x: Tensor, size: int) -> Tensor:
    """As `fake_quantize_rows`, with a scale for each `size` neighbouring inputs, which divides them."""
    return fake_quantize_rows(x.unflatten(-1, (-1, size))).flatten(-2)


def fake_quantize_tensor(x: Tensor) -> Tensor:
    """ONNX DynamicQuantizeLinear and back: float32, one uint8 scale and zero point for all of x."""
    if not x.numel():
        return x
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / _ACTIVATION_LEVELS
    scale = torch.where(scale > 0, scale, 1)
    zero = (-low / scale).clamp(0, _ACTIVATION_LEVELS).round()
    return ((x / scale).round_().add_(zero).clamp_(0, _ACTIVATION_LEVELS) - zero).mul_(scale)


def outlier_statistics(x: Tensor) -> OutlierStatistics:
    """Statistics of the inputs of a layer, [..., in].

    Raises:
        QuantizationError: no rows, NaN or infinity.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
    if not rows.numel() or not bool(torch.isfinite(rows).all()):
        raise QuantizationError(f"inputs {list(x.shape)} are empty, or hold NaN or infinity")
    row_max = rows.abs().amax(-1)
    channel_rms = rows.square().mean(0).sqrt()
    tensor_error, row_error = (
        _ratio((fake - rows).square().sum(), rows.square().sum(), 0.0)
        for fake in (fake_quantize_tensor(rows), fake_quantize_rows(rows))
    )
    return OutlierStatistics(
        absmax=float(row_max.max()),
        row_ratio=_ratio(row_max.max(), row_max[row_max > 0].median(), 1.0) if bool(row_max.any()) else 1.0,
        channel_ratio=_ratio(channel_rms.max(), channel_rms.mean(), 1.0),
        channel_kurtosis=_ratio(channel_rms.pow(4).mean(), channel_rms.square().mean().square(), 1.0),
        tensor_error=tensor_error,
        row_error=row_error,
    )


def _activations(formats: Sequence[WeightFormat | None]) -> set[str]:
    return {chosen.activations for chosen in formats if chosen is not None}


def _ratio(over: Tensor, under: Tensor, empty: float) -> float:
    """over / under, or `empty` where there is nothing to compare; infinite if only `under` is 0."""
    if not float(under):
        return empty if not float(over) else float("inf")
    return float(over) / float(under)
