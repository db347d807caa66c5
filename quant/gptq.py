"""GPTQ (Frantar et al. 2022): round one input's weights after another, and let the others make up for the error.

The proxy error of a layer is tr((W − Q) H (W − Q)ᵀ), H the mean of x xᵀ over the layer's inputs: the squared
error of its output. Each output row is a problem of its own with the same H. Scales are fixed before the first
code (by the clip search, with the diagonal of H), so the columns can be visited in any order and the codes are
stored in their natural order all the same.

Two things follow where `refine_passes` asks for them: the scales are fitted to the codes under the whole H, and
each code is chosen again given all others (coordinate descent). Neither step can raise the damped proxy error.

Matrices are transposed inside, so that what is done to one input is contiguous. Legend: I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zreward.errors import QuantizationError
from zreward.quant.rtn import assembled, decode, grid, levels_of, nearest_levels, storable
from zreward.quant.tensor import QuantizedWeight, WeightFormat

DOUBLE_UP_TO = 2048
"""Inputs up to which the arithmetic is float64. Above, it would take half of a large machine's memory."""

_DIAGONAL_FLOOR = 1e-6  # of the mean: an input that the calibration never excited
_DAMPING_LIMIT = 1.0  # twice the diagonal: with more, H says nothing any more


class HessianAccumulator:
    """The mean of x xᵀ over rows that come in batches.

    Attributes:
        count: rows seen, or the sum of their weights.
        absmax: [in], the largest |x| of each input.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        dtype = _dtype(in_features)
        self.count = 0.0
        self.absmax = torch.zeros(in_features, device=device)
        self._sum = torch.zeros(in_features, in_features, dtype=dtype, device=device)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            x: [..., in], any float type.
            mask: [...]: bool, which rows count; or float, the weight of each.

        Raises:
            QuantizationError: NaN or infinity in a row that counts, or a shape that does not fit.
        """
        inputs = self._sum.shape[0]
        if x.shape[-1] != inputs or (mask is not None and mask.shape != x.shape[:-1]):
            shape = None if mask is None else list(mask.shape)
            raise QuantizationError(f"rows {list(x.shape)} with mask {shape} do not fit {inputs} inputs")
        rows = x.detach().reshape(-1, inputs)
        weights = None if mask is None else mask.reshape(-1).to(rows.device)
        if weights is not None:
            rows, weights = rows[weights > 0], weights[weights > 0]
        if not bool(torch.isfinite(rows).all()):
            raise QuantizationError(
                "the inputs of the layer hold NaN or infinity; the model is broken before it"
            )
        if not len(rows):
            return
        rows = rows.to(self._sum)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0).to(self.absmax))
        if weights is None:
            self.count += len(rows)
        else:
            self.count += float(weights.sum(dtype=torch.float64))
            rows = rows * weights.to(rows).sqrt_()[:, None]
        self._sum.addmm_(rows.T, rows)

    @property
    def hessian(self) -> Tensor:
        """Σ x xᵀ / count, [in, in]; float64 up to `DOUBLE_UP_TO` inputs, else float32.

        Raises:
            QuantizationError: no rows.
        """
        if not self.count:
            raise QuantizationError("no calibration rows reached the layer")
        return self._sum / self.count

    @property
    def mean_square(self) -> Tensor:
        """[in] float32 mean of x², the diagonal of the Hessian: `importance` of `quantize_rtn`."""
        return (self._sum.diagonal() / max(self.count, 1e-30)).to(torch.float32)


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    fmt: WeightFormat,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    refine_passes: int = 3,
) -> QuantizedWeight:
    """Quantize a matrix for the least error of its output.

    Args:
        weight: [out, in], any float type and device.
        hessian: [in, in], a positive multiple of the mean of x xᵀ; the multiple does not matter.
        fmt: bits, groups and symmetry.
        damping: share of the mean diagonal that is added to the diagonal; raised tenfold, up to 1, while H is
            not positive definite.
        act_order: visit the inputs in the order of falling diagonal rather than their own.
        block: inputs after which the remaining columns are updated at once.
        refine_passes: passes over scales and codes afterwards; stops when a pass changes nothing. Three take
            about a tenth off the error of the output, more hardly anything. Each costs about three times the
            rounding itself.

    Raises:
        QuantizationError: NaN or infinity, shapes that do not fit, a group size that does not divide, or an H
            that no damping makes positive definite.
    """
    _check(weight, hessian)
    importance = hessian.diagonal().to(torch.float64)
    mean = float(importance.mean())
    importance = importance / mean + damping if mean > 0 else torch.ones_like(importance)
    scales, zeros = grid(weight, fmt, importance)

    order = torch.argsort(importance, descending=True, stable=True) if act_order else None
    factor, damping = _inverse_factor(hessian, damping, order)
    codes = _propagated(weight, factor, order, scales, zeros, fmt, block)
    del factor
    if refine_passes:
        damped = _damped(hessian, damping)
        for _ in range(refine_passes):
            scales = _fitted_scales(weight, damped, codes, scales, zeros, fmt)
            codes, changed = _descended(weight, damped, codes, scales, zeros, fmt, block)
            if not changed:
                break
    return assembled(fmt, codes, scales, zeros)


def proxy_error(weight: Tensor, quantized: QuantizedWeight | Tensor, hessian: Tensor) -> float:
    """tr((W − Q) H (W − Q)ᵀ): with H the mean of x xᵀ, the mean squared norm of the output's error."""
    if isinstance(quantized, QuantizedWeight):
        quantized = torch.from_numpy(quantized.dequantized())
    difference = (weight - quantized.to(weight)).to(hessian)
    return float(((difference @ hessian) * difference).sum())


def _dtype(in_features: int) -> torch.dtype:
    return torch.float64 if in_features <= DOUBLE_UP_TO else torch.float32


def _check(weight: Tensor, hessian: Tensor) -> None:
    inputs = weight.shape[-1]
    if hessian.shape != (inputs, inputs):
        raise QuantizationError(
            f"a Hessian {list(hessian.shape)} does not fit a weight {list(weight.shape)}; it must be "
            f"[{inputs}, {inputs}]"
        )
    if not bool(torch.isfinite(hessian).all()) or bool((hessian.diagonal() < 0).any()):
        raise QuantizationError("the Hessian holds NaN, infinity or a negative diagonal")


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """H / mean(diag H) + damping · I, a copy in the type of the arithmetic; the identity for H = 0."""
    matrix = hessian.to(_dtype(len(hessian)), copy=True)
    diagonal = matrix.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix /= mean
    diagonal.clamp_(min=_DIAGONAL_FLOOR).add_(damping)
    return matrix


def _inverse_factor(hessian: Tensor, damping: float, order: Tensor | None) -> tuple[Tensor, float]:
    """Upper triangular U with UᵀU = H⁻¹ of the damped, permuted H; and the damping that it took.

    With J the reversal, J H J = L Lᵀ makes H = R Rᵀ for the upper triangular R = J L J, and U = R⁻¹. Inverting a
    factor loses half as many digits as factoring an inverse.
    """
    while True:
        matrix = _damped(hessian, damping)
        if order is not None:
            matrix = matrix[order][:, order]
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not int(failed):
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damping
        if damping >= _DAMPING_LIMIT:
            raise QuantizationError(
                f"the Hessian is not positive definite, even with damping {damping:g}; it is no mean of x xᵀ"
            )
        damping = min(max(10 * damping, 1e-4), _DAMPING_LIMIT)


def _propagated(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    fmt: WeightFormat,
    block: int,
) -> Tensor:
    """The codes, uint8 [out, in], each rounded after the errors of those before it were passed on."""
    inputs = weight.shape[1]
    natural = torch.arange(inputs, device=weight.device)
    visit = natural if order is None else order
    rows_IO = weight.detach().T[visit].to(factor.dtype).contiguous()
    codes_IO = torch.empty(rows_IO.shape, dtype=torch.uint8, device=weight.device)
    scales_GO, zeros_GO = (grid_OG.T.to(factor.dtype).contiguous() for grid_OG in (scales, zeros))
    groups = (visit // (inputs // len(scales_GO))).tolist()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        head, triangle = rows_IO[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(head)
        for i in range(stop - start):
            scale, zero = scales_GO[groups[start + i]], zeros_GO[groups[start + i]]
            level, codes_IO[start + i] = nearest_levels(head[i] / scale, zero, fmt)
            errors[i] = (head[i] - level * scale) / triangle[i, i]
            head[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        rows_IO[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes_IO)
    restored[visit] = codes_IO
    return restored.T


def _gradient(
    weight: Tensor, damped: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, fmt: WeightFormat
) -> Tensor:
    """H (Q − W)ᵀ, [in, out]: half of the proxy error's gradient."""
    difference = decode(codes, scales, zeros, fmt).sub_(weight)
    return damped @ difference.T.to(damped.dtype)


def _fitted_scales(
    weight: Tensor, damped: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, fmt: WeightFormat
) -> Tensor:
    """Scales [out, groups], one group after the other least-squares optimal given all else.

    A change s → s + δ of a group with levels c changes the error by 2δ cᵀg + δ² cᵀHc, where g is the group's part
    of H (Q − W)ᵀ. It is made where that is negative for the δ that float16 leaves.
    """
    gradient_IO = _gradient(weight, damped, codes, scales, zeros, fmt)
    fitted = scales.clone()
    size = codes.shape[1] // scales.shape[1]
    for group in range(scales.shape[1]):
        start, stop = group * size, (group + 1) * size
        levels = levels_of(codes[:, start:stop], zeros[:, group, None], fmt).to(damped.dtype).T
        slope = (gradient_IO[start:stop] * levels).sum(0)
        curvature = ((damped[start:stop, start:stop] @ levels) * levels).sum(0)
        old = scales[:, group].to(damped.dtype)
        new = storable((old - slope / curvature.clamp(min=1e-30)).to(torch.float32)).to(damped.dtype)
        change = new - old
        gains = (2 * change * slope + change.square() * curvature < 0) & torch.isfinite(new)
        change = torch.where(gains, change, 0)
        fitted[:, group] = torch.where(gains, new, old).to(fitted.dtype)
        gradient_IO[stop:].addmm_(damped[stop:, start:stop], levels * change)
    return fitted


def _descended(
    weight: Tensor,
    damped: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    fmt: WeightFormat,
    block: int,
) -> tuple[Tensor, int]:
    """One pass of coordinate descent: the best code of each input given all others; and how many changed."""
    gradient_IO = _gradient(weight, damped, codes, scales, zeros, fmt)
    inputs = codes.shape[1]
    size = inputs // scales.shape[1]
    codes_IO = codes.T.clone(memory_format=torch.contiguous_format)
    levels = levels_of(codes.reshape(*scales.shape, -1), zeros[:, :, None], fmt).reshape(codes.shape)
    levels_IO = levels.T.to(damped.dtype).contiguous()
    scales_GO, zeros_GO = (grid_OG.T.to(damped.dtype).contiguous() for grid_OG in (scales, zeros))
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        head, square = gradient_IO[start:stop], damped[start:stop, start:stop]
        changes = torch.empty_like(head)
        for i in range(stop - start):
            group, old = (start + i) // size, levels_IO[start + i]
            scale = scales_GO[group]
            # The error is a parabola in the level: the one nearest to its vertex is the best.
            vertex = old - head[i] / (square[i, i] * scale)
            best, codes_IO[start + i] = nearest_levels(vertex, zeros_GO[group], fmt)
            changes[i] = (best - old) * scale
            head[i + 1 :].addr_(square[i + 1 :, i], changes[i])
        gradient_IO[stop:].addmm_(damped[stop:, start:stop], changes)
    return codes_IO.T, int((codes_IO != codes.T).sum())
