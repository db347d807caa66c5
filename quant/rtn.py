"""Round to nearest, with a search for the scale of each group. The grid that it finds is also GPTQ's.

The largest weight of a group would fix its scale; a smaller scale clips that weight and rounds all others more
finely. The search tries a few shrink factors, then refits the scale to the codes (least squares), and keeps what
has the least squared error, each input weighted by its mean square. Every error is measured with the scale as
float16 stores it, so the result is never worse than the scale that clips nothing. Floats of 8 bits round small weights
finely anyway: there the largest weight of an output fixes the scale.

Work goes by blocks of rows that stay near a processor's cache: memory does not grow with the matrix.

Shapes: R rows, G groups of a row, K inputs of a group; `grouped` is always [R, G, K].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from zreward.errors import QuantizationError
from zreward.quant.float8 import LARGEST, nearest_float8
from zreward.quant.tensor import QuantizedWeight, WeightFormat

SHRINK = {4: tuple(1 - 0.04 * step for step in range(11)), 8: tuple(1 - 0.02 * step for step in range(6))}
"""Factors of the scale that clips nothing, by bits. 8 bits round so finely that deep clipping never pays."""

REFITS = 2
"""Least-squares steps after the search."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16; the scale of a group of zeros."""

_BLOCK_ELEMENTS = {"cpu": 2**20}
_BLOCK_ELEMENTS_ACCELERATOR = 2**24


def quantize_rtn(
    weight: Tensor, fmt: WeightFormat, importance: Tensor | None = None, clip_search: bool = True
) -> QuantizedWeight:
    """Quantize a matrix by rounding each weight to the nearest value of its group's grid.

    Args:
        weight: [out, in], any float type and device.
        fmt: bits, groups and symmetry.
        importance: [in], not negative: weight of each input's squared error, such as the mean square of the
            input (the diagonal of the Hessian). None: all alike.
        clip_search: search the scales; False: the scale that clips nothing.

    Raises:
        QuantizationError: NaN or infinity, a group size that does not divide, a wrong shape, or weights that
            need a scale beyond float16.
    """
    scales, zeros = grid(weight, fmt, importance, clip_search)
    return assembled(fmt, encode(weight, fmt, scales, zeros), scales, zeros)


def fake_quantize(weight: Tensor, fmt: WeightFormat, importance: Tensor | None = None) -> Tensor:
    """The float32 [out, in] matrix that `quantize_rtn` stands for, on the device of `weight`."""
    scales, zeros = grid(weight, fmt, importance)
    return decode(encode(weight, fmt, scales, zeros), scales, zeros, fmt)


def grid(
    weight: Tensor, fmt: WeightFormat, importance: Tensor | None = None, clip_search: bool = True
) -> tuple[Tensor, Tensor]:
    """Scales and zero points for a matrix; arguments and errors as in `quantize_rtn`.

    Returns:
        float32 [out, groups] scales, positive values that float16 holds, and float32 [out, groups] zero points,
        whole numbers from 0 to `fmt.max_code`.
    """
    shares = _checked(weight, fmt, importance)
    if fmt.is_float8:
        return _float8_grid(weight)
    factors = SHRINK[fmt.bits] if clip_search else (1.0,)
    found = [
        _search(grouped, shares, fmt, factors, REFITS if clip_search else 0)
        for grouped in _row_blocks(weight, fmt)
    ]
    scales = torch.cat([scales for scales, _ in found])
    zeros = torch.cat([zeros for _, zeros in found])
    return _finite(scales, weight), zeros


def encode(weight: Tensor, fmt: WeightFormat, scales: Tensor, zeros: Tensor) -> Tensor:
    """uint8 [out, in] codes: the nearest value of each weight on a given grid."""
    start, parts = 0, []
    for grouped in _row_blocks(weight, fmt):
        stop = start + len(grouped)
        if fmt.is_float8:
            _, codes = nearest_float8(grouped / scales[start:stop, :, None])
        else:
            levels = _levels(grouped, scales[start:stop], zeros[start:stop], fmt)
            codes = levels.add_(zeros[start:stop, :, None]).to(torch.uint8)
        parts.append(codes.reshape(len(codes), -1))
        start = stop
    return torch.cat(parts)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor, fmt: WeightFormat) -> Tensor:
    """float32 [out, in] values of uint8 codes."""
    levels = levels_of(codes.reshape(*scales.shape, -1), zeros[:, :, None], fmt)
    return levels.mul_(scales[:, :, None]).reshape(codes.shape)


def levels_of(codes: Tensor, zeros: Tensor, fmt: WeightFormat) -> Tensor:
    """What scales multiply, float32 in the shape of uint8 codes: code − zero point, or the float of 8 bits."""
    if fmt.is_float8:
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    return codes.to(torch.float32).sub_(zeros)


def nearest_levels(values: Tensor, zeros: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """The nearest levels of a grid, in the type of `values`, which is used up, and their codes in any type."""
    if fmt.is_float8:
        return nearest_float8(values)
    codes = values.round_().add_(zeros).clamp_(0, fmt.max_code)
    return codes - zeros, codes


def assembled(fmt: WeightFormat, codes: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    """Codes and grid, from any device, as the arrays that are stored."""
    return QuantizedWeight(
        fmt,
        np.ascontiguousarray(codes.cpu().numpy()),
        scales.to(torch.float32).cpu().numpy(),
        zeros.to(torch.uint8).cpu().numpy(),
    )


def storable(scales: Tensor) -> Tensor:
    """Positive scales rounded to the nearest that float16 holds; infinite where they are beyond it."""
    return scales.to(torch.float16).to(scales.dtype).clamp_(min=SMALLEST_SCALE)


def _float8_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [out, 1], the least of float16 with which no weight is beyond the largest float of 8 bits; no offsets."""
    largest = weight.detach().abs().amax(1, keepdim=True).to(torch.float32)
    near = (largest / LARGEST).to(torch.float16)
    above = (near.view(torch.int16) + 1).view(torch.float16)  # the next float16
    scales = torch.where(near.float() * LARGEST < largest, above, near).float().clamp_(min=SMALLEST_SCALE)
    return _finite(scales, weight), torch.zeros_like(scales)


def _finite(scales: Tensor, weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(scales).all()):
        largest = float(weight.abs().max())
        raise QuantizationError(
            f"the matrix holds weights as large as {largest:.3g}, and their scale is beyond float16; "
            "leave this layer unquantized"
        )
    return scales


def _checked(weight: Tensor, fmt: WeightFormat, importance: Tensor | None) -> Tensor | None:
    """Refuse bad input at the door; the importance as float32 [G, K]."""
    if weight.ndim != 2 or not weight.numel():
        raise QuantizationError(f"a weight must be a matrix [out, in], not of shape {list(weight.shape)}")
    if fmt.act_order:
        raise QuantizationError(
            "codes in another order than their inputs are read from checkpoints, never made"
        )
    groups = fmt.n_groups(weight.shape[1])
    # A sum is finite only if every term is, and needs no mask of the size of the matrix. One that overflows
    # is settled by looking at each weight.
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise QuantizationError("the matrix holds NaN or infinity; the checkpoint is damaged")
    if importance is None:
        return None
    if importance.shape != weight.shape[1:]:
        raise QuantizationError(
            f"importance has shape {list(importance.shape)}; it must be [{weight.shape[1]}], one value an input"
        )
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise QuantizationError("the importance of an input is NaN, infinite or negative")
    return importance.to(weight.device, torch.float32).reshape(groups, -1)


def _row_blocks(weight: Tensor, fmt: WeightFormat) -> Iterator[Tensor]:
    """The matrix as float32 [R, G, K], some rows at a time."""
    inputs = weight.shape[1]
    elements = _BLOCK_ELEMENTS.get(weight.device.type, _BLOCK_ELEMENTS_ACCELERATOR)
    for rows in weight.detach().split(max(1, elements // inputs)):
        yield rows.to(torch.float32).reshape(len(rows), fmt.n_groups(inputs), -1)


def _search(
    grouped: Tensor, importance: Tensor | None, fmt: WeightFormat, factors: tuple[float, ...], refits: int
) -> tuple[Tensor, Tensor]:
    """The best scale and zero point [R, G] of each group."""
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    scales, zeros = _covering(low, high, fmt)
    if len(factors) == 1 and not refits:
        return scales, zeros
    error, refit = _measured(grouped, importance, scales, zeros, fmt)
    for step in range(1, len(factors) + refits):
        if step < len(factors):
            trial, trial_zeros = _covering(low * factors[step], high * factors[step], fmt)
        else:
            trial, trial_zeros = refit, zeros
        trial_error, trial_refit = _measured(grouped, importance, trial, trial_zeros, fmt)
        better = trial_error < error
        error = torch.where(better, trial_error, error)
        scales, zeros = torch.where(better, trial, scales), torch.where(better, trial_zeros, zeros)
        refit = torch.where(better, trial_refit, refit)
    return scales, zeros


def _covering(low: Tensor, high: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """The finest scale whose grid reaches from `low` (≤ 0) to `high` (≥ 0), and the zero point."""
    if fmt.symmetric:
        scales = storable(torch.maximum(high / (fmt.middle - 1), low / -fmt.middle))
        return scales, torch.full_like(scales, fmt.middle)
    scales = storable(high / fmt.max_code - low / fmt.max_code)  # the difference alone could overflow
    return scales, (low / -scales).round_().clamp_(0, fmt.max_code)


def _levels(grouped: Tensor, scales: Tensor, zeros: Tensor, fmt: WeightFormat) -> Tensor:
    """code − zero point, as float32 [R, G, K], of the nearest grid value."""
    levels = grouped / scales[:, :, None]
    levels.round_()
    if fmt.symmetric:
        return levels.clamp_(-fmt.middle, fmt.middle - 1)
    return levels.clamp_(-zeros[:, :, None], (fmt.max_code - zeros)[:, :, None])


def _measured(
    grouped: Tensor, importance: Tensor | None, scales: Tensor, zeros: Tensor, fmt: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Weighted squared error [R, G] of a grid, and the scale [R, G] that fits its codes best."""
    levels = _levels(grouped, scales, zeros, fmt)
    error = _weighted_sum(torch.addcmul(grouped, levels, scales[:, :, None], value=-1).square_(), importance)
    across = _weighted_sum(grouped * levels, importance)
    square = _weighted_sum(levels.square_(), importance)
    usable = (across > 0) & (square > 0)
    return error, torch.where(usable, storable(across / square), scales)


def _weighted_sum(values: Tensor, importance: Tensor | None) -> Tensor:
    return (values if importance is None else values.mul_(importance)).sum(-1)
