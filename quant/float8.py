"""Floats of 8 bits: E4M3, with a sign, four bits of exponent and three of mantissa.

The format is float8_e4m3fn of the OCP 8-bit floating point specification (revision 1.0), FLOAT8E4M3FN in ONNX: the
largest value is 448, there is no infinity, and 0x7f and 0xff are NaN.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 448.0
NAN_CODES = (0x7F, 0xFF)

_BIAS, _MANTISSA = 7, 8


def nearest_float8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest float of 8 bits; larger values than the largest become that.

    Args:
        values: any shape, float type and device; finite.

    Returns:
        The floats in the type of `values`, and their codes, uint8.
    """
    nearest = values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return nearest.to(values.dtype), nearest.view(torch.uint8)


def float8_values() -> NDArray[np.float32]:
    """What each of the 256 codes stands for."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 0x7
    subnormal = mantissa / _MANTISSA * 2.0 ** (1 - _BIAS)
    normal = (1 + mantissa / _MANTISSA) * 2.0 ** (exponent - _BIAS)
    values = np.where(exponent == 0, subnormal, normal) * np.where(codes >> 7, -1, 1)
    values[list(NAN_CODES)] = np.nan
    return values.astype(np.float32)
