"""Shaded sprites of the four shapes and the silhouettes of their shadows.

Each shape is shaded once at `CANVAS` pixels with light from the upper left; a scene colours the shading
and resamples it. That keeps drawing an object well under a millisecond.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from zreward.synthetic.language import COLOURS

CANVAS = 128
_SUPERSAMPLE = 2
_LIGHT = np.array([-0.5, -0.62, 0.6]) / np.linalg.norm([-0.5, -0.62, 0.6])

FloatArray = NDArray[np.float64]


@lru_cache(maxsize=8)
def shading(shape: str) -> tuple[FloatArray, FloatArray, Image.Image]:
    """Diffuse shade (about 0.3 to 1.1), specular highlight (0 to 1) and alpha mask of a shape.

    Returns:
        Two arrays [CANVAS, CANVAS] and an image of mode "L" of the same size.
    """
    shade, highlight = {"ball": _ball, "cube": _cube, "cone": _cone, "cylinder": _cylinder}[shape]()
    return shade, highlight, _mask(shape)


def sprite(shape: str, colour: str, width: int, pattern: float = 0.0) -> Image.Image:
    """The shape in its colour as an RGBA image of `width` by `width` pixels.

    Args:
        pattern: contrast (0 to 1) of a flat printed check, the texture defect.
    """
    return _full_sprite(shape, colour, round(pattern, 3)).resize((width, width), Image.Resampling.BOX)


def shadow_mask(alpha: Image.Image, direction: float) -> Image.Image:
    """The silhouette thrown on the floor: squashed, sheared towards `direction` (+1 right) and blurred.

    Returns:
        Mode "L", three times as wide as `alpha` and 0.4 times as high; the object's foot is at the
        bottom centre.
    """
    width, height = alpha.size
    out_w, out_h = 3 * width, max(2, round(0.4 * height))
    shear = 0.95 * width * direction
    # Affine from output to input pixels: rows are stretched back, the top row is moved by `shear`.
    coefficients = (1.0, shear / out_h, -width - shear, 0.0, height / out_h, 0.0)
    thrown = alpha.transform((out_w, out_h), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return thrown.filter(ImageFilter.GaussianBlur(max(0.6, width / 40)))


@lru_cache(maxsize=256)
def _full_sprite(shape: str, colour: str, pattern: float) -> Image.Image:
    shade, highlight, mask = shading(shape)
    if pattern > 0:
        rows, columns = np.mgrid[0:CANVAS, 0:CANVAS]
        check = ((rows // 13 + columns // 13) % 2) * 2.0 - 1.0
        shade = (1 - 0.5 * pattern) * shade + 0.5 * pattern * 0.8 + 0.45 * pattern * check
        highlight = highlight * (1 - pattern)
    base = np.asarray(COLOURS[colour], dtype=np.float64)
    rgb = base * shade[..., None] + 235.0 * highlight[..., None]
    rgba = np.dstack([np.clip(rgb, 0, 255), np.asarray(mask, dtype=np.float64)])
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


def _mask(shape: str) -> Image.Image:
    """The silhouette, anti-aliased; it touches the bottom of the canvas."""
    side = CANVAS * _SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    at = side / 100
    if shape == "ball":
        draw.ellipse((4 * at, 7 * at, 96 * at, 99 * at), fill=255)
    elif shape == "cube":
        draw.polygon([(x * at, y * at) for x, y in _CUBE_OUTLINE], fill=255)
    elif shape == "cone":
        draw.polygon([(50 * at, 2 * at), (7 * at, 88 * at), (93 * at, 88 * at)], fill=255)
        draw.ellipse((7 * at, 77 * at, 93 * at, 99 * at), fill=255)
    else:
        draw.rectangle((20 * at, 13 * at, 80 * at, 89 * at), fill=255)
        draw.ellipse((20 * at, 3 * at, 80 * at, 23 * at), fill=255)
        draw.ellipse((20 * at, 79 * at, 80 * at, 99 * at), fill=255)
    return mask.resize((CANVAS, CANVAS), Image.Resampling.BOX)


_CUBE_OUTLINE = ((6, 30), (30, 8), (95, 8), (95, 74), (71, 99), (6, 99))
_CUBE_TOP = ((6, 30), (30, 8), (95, 8), (71, 30))
_CUBE_SIDE = ((71, 30), (95, 8), (95, 74), (71, 99))


def _grid() -> tuple[FloatArray, FloatArray]:
    """Pixel centres in percent of the canvas: x, y."""
    axis = (np.arange(CANVAS) + 0.5) * 100 / CANVAS
    return np.broadcast_to(axis[None, :], (CANVAS, CANVAS)), np.broadcast_to(axis[:, None], (CANVAS, CANVAS))


def _lit(nx: FloatArray, ny: FloatArray, nz: FloatArray) -> tuple[FloatArray, FloatArray]:
    diffuse = np.clip(nx * _LIGHT[0] + ny * _LIGHT[1] + nz * _LIGHT[2], 0, 1)
    return 0.42 + 0.66 * diffuse, 0.75 * np.clip((diffuse - 0.9) / 0.1, 0, 1) ** 2


def _ball() -> tuple[FloatArray, FloatArray]:
    x, y = _grid()
    nx, ny = (x - 50) / 46, (y - 53) / 46
    return _lit(nx, ny, np.sqrt(np.clip(1 - nx**2 - ny**2, 0, 1)))


def _cube() -> tuple[FloatArray, FloatArray]:
    faces = Image.new("L", (CANVAS, CANVAS), 205)
    draw = ImageDraw.Draw(faces)
    at = CANVAS / 100
    draw.polygon([(px * at, py * at) for px, py in _CUBE_TOP], fill=250)
    draw.polygon([(px * at, py * at) for px, py in _CUBE_SIDE], fill=118)
    _, y = _grid()
    shade = np.asarray(faces, dtype=np.float64) / 230 * (1.04 - 0.0012 * y)
    return shade, np.zeros_like(shade)


def _round_side(x: FloatArray, half_width: FloatArray) -> tuple[FloatArray, FloatArray]:
    nx = np.clip((x - 50) / np.maximum(half_width, 1.0), -1, 1)
    return _lit(0.95 * nx, np.full_like(nx, -0.2), 0.95 * np.sqrt(1 - nx**2))


def _cone() -> tuple[FloatArray, FloatArray]:
    x, y = _grid()
    return _round_side(x, (y - 2) / 86 * 43)


def _cylinder() -> tuple[FloatArray, FloatArray]:
    x, y = _grid()
    shade, highlight = _round_side(x, np.full_like(y, 30.0))
    cap = ((x - 50) / 30) ** 2 + ((y - 13) / 10) ** 2 <= 1
    return np.where(cap, 1.12, shade), np.where(cap, 0.06, highlight * 0.4)
