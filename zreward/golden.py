"""Golden inputs: small pictures drawn from a formula, whose scores a bundle must reproduce.

They exist to detect a changed engine, not to be judged: shapes and gradients with structure at every scale,
in the aspect ratios and modes that take different paths through preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from zreward.image import ImageSpec

_CASES = (
    ("a red disc on a blue field", 8, 8, "RGB"),
    ("three stripes, wide format", 4, 16, "RGB"),
    ("a tall grey tower", 16, 4, "L"),
    ("a translucent green square", 6, 9, "RGBA"),
)


def golden_inputs(spec: ImageSpec) -> Iterator[tuple[str, Image.Image]]:
    """Prompts and pictures; the sizes are near the smallest that `spec` takes without enlarging."""
    side = spec.patch_size * spec.merge_size
    for index, (prompt, height, width, mode) in enumerate(_CASES):
        yield prompt, _picture(height * side, width * side, index).convert(mode)


def _picture(height: int, width: int, index: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    disc = (np.hypot(y - 0.5, x - 0.4 - 0.05 * index) < 0.25).astype(np.float64)
    stripes = 0.5 + 0.5 * np.sin(2 * np.pi * (3 + index) * (x + 0.3 * y))
    checks = ((np.floor(12 * x) + np.floor(12 * y)) % 2) * 0.4
    channels = [0.8 * disc + 0.2 * y, 0.6 * stripes + 0.2 * checks, 0.5 * x + 0.4 * (1 - disc), 0.5 + 0.5 * y]
    pixels = np.clip(np.stack(channels, axis=-1) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(pixels, mode=None)
