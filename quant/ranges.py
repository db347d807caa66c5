"""One scale for all inputs of a layer, for runtimes that must know it before they see any.

A histogram of the magnitudes is all that is kept: 16 bins an octave. The scale of whole numbers is the one with the
least expected squared error: values above 127 steps are cut there, those below half a step become zero, and the others
are off by a uniform error of one step. Tokens count by their weights, so an outlier in a token that the scores do not
depend on may be cut. Floats of 8 bits have room for 15 octaves, and the largest value is their largest float.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zreward.errors import QuantizationError
from zreward.quant.float8 import LARGEST, nearest_float8

STATIC_CODES = 127
"""Largest code of a static scale; the grid is symmetric, without a zero point."""

_LOWEST, _OCTAVES, _PER_OCTAVE = -24, 64, 16  # from 2⁻²⁴; less is zero to any scale that is used


class MagnitudeHistogram:
    """How often each magnitude occurs among the inputs of a layer, over rows that come in batches."""

    def __init__(self) -> None:
        self._counts = np.zeros(_OCTAVES * _PER_OCTAVE)
        self._largest = 0.0

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in rows.

        Args:
            x: [..., in], any float type and device.
            mask: [...]: bool, which rows count; or float, the weight of each.

        Raises:
            QuantizationError: NaN or infinity in a row that counts.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        weights = torch.ones(len(rows)) if mask is None else mask.reshape(-1).to(rows)
        rows, weights = rows[weights > 0].abs(), weights[weights > 0]
        if not bool(torch.isfinite(rows).all()):
            raise QuantizationError(
                "the inputs of the layer hold NaN or infinity; the model is broken before it"
            )
        if not rows.numel():
            return
        self._largest = max(self._largest, float(rows.max()))
        places = ((rows.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _PER_OCTAVE).long()
        places = places.clamp_(0, len(self._counts) - 1).flatten()
        spread = weights[:, None].expand_as(rows).flatten().to(torch.float64)
        self._counts += torch.bincount(places, spread, minlength=len(self._counts)).cpu().numpy()

    def scale_for(self, activations: str) -> float:
        """The scale of inputs that are rounded as `WeightFormat.activations` says; of inputs that are all zero, any.

        Raises:
            QuantizationError: no rows.
        """
        return self._float8_scale if activations == "fp8-static" else self.scale

    @property
    def _float8_scale(self) -> float:
        self._check_rows()
        return (self._largest if self._largest > 2.0**_LOWEST else 1.0) / LARGEST

    @property
    def scale(self) -> float:
        """The step of whole numbers with the least error; of inputs that are all zero, any.

        Raises:
            QuantizationError: no rows.
        """
        self._check_rows()
        if self._largest <= 2.0**_LOWEST:
            return 1.0 / STATIC_CODES
        edges = 2.0 ** (_LOWEST + np.arange(1, len(self._counts) + 1) / _PER_OCTAVE)
        limits = np.minimum(edges, self._largest)
        share = np.cumsum(self._counts) / self._counts.sum()
        candidates = np.unique(limits[share >= 0.5])  # to cut half of the inputs costs more than any rounding
        magnitudes = np.minimum(edges * 2.0 ** (-0.5 / _PER_OCTAVE), self._largest)
        errors = [_error(magnitudes, self._counts, limit / STATIC_CODES) for limit in candidates]
        return float(candidates[int(np.argmin(errors))]) / STATIC_CODES

    def _check_rows(self) -> None:
        if not self._counts.any():
            raise QuantizationError("no calibration rows reached the layer")


def static_scale(x: Tensor, activations: str = "int8-static") -> float:
    """The best scale of inputs [..., in] that are all at hand."""
    histogram = MagnitudeHistogram()
    histogram.add(x)
    return histogram.scale_for(activations)


def fake_quantize_static(x: Tensor, scale: float, activations: str = "int8-static") -> Tensor:
    """What a product reads in place of x where its inputs are rounded with a static scale.

    Args:
        x: any shape, float type and device.
        scale: the step, or what 1 stands for among floats of 8 bits.
        activations: see `WeightFormat`.
    """
    if activations == "fp8-static":
        nearest, _ = nearest_float8(x.detach().to(torch.float32) / scale)
        return (nearest * scale).to(x.dtype)
    codes = (x.detach().to(torch.float32) / scale).round_().clamp_(-STATIC_CODES - 1, STATIC_CODES)
    return (codes * scale).to(x.dtype)


def _error(magnitudes: NDArray[np.float64], counts: NDArray[np.float64], step: float) -> float:
    """Expected squared error with steps of this size."""
    inside = np.where(magnitudes < step / 2, magnitudes**2, step**2 / 12)
    beyond = np.maximum(magnitudes - STATIC_CODES * step, 0) ** 2
    return float((counts * np.maximum(inside, beyond)).sum())
