"""Drawing: a lit room, objects with thrown shadows, and every defect that can be seen.

Besides the picture, a segmentation is drawn (which object, shadow or scrap covers each pixel), for
per-token targets in vision pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from zreward.synthetic.config import SceneConfig
from zreward.synthetic.sprites import shadow_mask, sprite
from zreward.synthetic.truth import Defects, SceneObject

WALL, FLOOR, SHADOW, SCRAP, CRACK, FIRST_OBJECT = 0, 1, 2, 3, 4, 10
"""Values of the segmentation; object k of the scene is FIRST_OBJECT + k."""

_HORIZON = 0.52
_MARGIN = 0.2
"""Extra room drawn around a tilted picture, so that turning it leaves no empty corners."""
_FLOAT_GAP = (0.0, 0.09, 0.16, 0.25)
_SUNK_SHARE = (0.0, 0.2, 0.34, 0.48)
_SHADOW = ((0.64, 1.0), (0.2, 1.0), (0.0, 1.0), (0.64, -1.0))
"""Strength and direction of thrown shadows, by severity: right, faint, missing, towards the light."""
_TILT_DEGREES = (0.0, 5.0, 10.0, 17.0)
_SCRAPS = (0, 5, 11, 20)
_PATTERN = (0.0, 0.3, 0.6, 1.0)
_GARISH_SHARE = (0.0, 0.3, 0.6, 1.0)
_NOISE = (0.0, 13.0, 26.0, 46.0)
_BLUR = (0.0, 0.008, 0.014, 0.022)
_BLOCK_SHARE = (0.0, 0.4, 0.7, 1.0)
_BAND_LEVELS = (256, 9, 6, 4)
_BLOCKS_PER_SIDE = 20

_CALM = (
    ((226, 221, 210), (176, 160, 140)),
    ((206, 217, 222), (150, 152, 156)),
    ((222, 214, 222), (164, 150, 158)),
    ((212, 220, 206), (158, 156, 138)),
    ((232, 226, 216), (190, 178, 160)),
)
_GARISH = (
    ((255, 0, 150), (150, 255, 0)),
    ((0, 255, 220), (255, 0, 200)),
    ((190, 255, 0), (255, 60, 190)),
    ((255, 90, 220), (0, 235, 255)),
)
_SCRAP_COLOURS = ((96, 84, 72), (60, 60, 64), (128, 116, 96), (236, 232, 224))


@dataclass(frozen=True)
class Drawing:
    """`image` uint8 [size, size, 3] RGB and `segments` uint8 [size, size]."""

    image: NDArray[np.uint8]
    segments: NDArray[np.uint8]


def render(
    rng: np.random.Generator, objects: Sequence[SceneObject], defects: Defects, config: SceneConfig
) -> Drawing:
    """Draw one scene; the same arguments and generator state give the same pixels."""
    canvas = _Canvas(rng, defects, config)
    canvas.scatter_scraps(rng)
    for item in objects:
        canvas.throw_shadow(item)
    for index in sorted(range(len(objects)), key=lambda k: objects[k].base):
        canvas.draw_object(objects[index], FIRST_OBJECT + index)
    for index, item in enumerate(objects):
        if item.merged and index > 0:
            canvas.interleave(objects[index - 1], item, FIRST_OBJECT + index - 1)
    image, segments = canvas.photograph(rng)
    pixels = _degrade(rng, image, defects, config.defect_contrast)
    return Drawing(pixels, np.asarray(segments, dtype=np.uint8))


class _Canvas:
    """The picture and its segmentation while they are drawn, with a margin if the camera is tilted."""

    def __init__(self, rng: np.random.Generator, defects: Defects, config: SceneConfig) -> None:
        self.size = config.size
        self.defects = defects
        self.contrast = config.defect_contrast
        self.margin = round(_MARGIN * self.size) if defects.framing else 0
        side = self.size + 2 * self.margin
        self.horizon = self.margin + round(_HORIZON * self.size)
        self.picture = Image.fromarray(self._room(rng, side))
        self.segments = Image.new("L", (side, side), WALL)
        self.segments.paste(FLOOR, (0, self.horizon, side, side))
        self.sprites: dict[SceneObject, tuple[Image.Image, tuple[int, int]]] = {}

    def _room(self, rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
        calm = np.asarray(_CALM[rng.integers(len(_CALM))], dtype=np.float64)
        garish = np.asarray(_GARISH[rng.integers(len(_GARISH))], dtype=np.float64)
        share = min(1.0, _GARISH_SHARE[self.defects.palette] * self.contrast)
        wall, floor = (1 - share) * calm + share * garish
        rows = np.arange(side)[:, None, None] / side
        columns = np.arange(side)[None, :, None] / side
        room = np.where(np.arange(side)[:, None, None] < self.horizon, wall, floor)
        light = 1.07 - 0.14 * columns - 0.05 * np.where(rows * side < self.horizon, rows, 1.2 - rows)
        grain = rng.normal(0.0, 1.6, (side, side, 1))
        return _bytes(room * light + grain)

    def scatter_scraps(self, rng: np.random.Generator) -> None:
        """The clutter defect: small scraps of paper and grit on the floor and against the wall."""
        count = round(_SCRAPS[self.defects.clutter] * min(1.5, max(0.3, self.contrast)))
        if not self.defects.clutter:
            return
        pen, marker = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.segments)
        for _ in range(count):
            x = self.margin + rng.uniform(0.02, 0.98) * self.size
            y = self.margin + rng.uniform(_HORIZON - 0.25, 0.99) * self.size
            radius = rng.uniform(0.015, 0.027) * self.size
            angles = np.arange(4) * np.pi / 2 + rng.uniform(-0.6, 0.6, 4)
            corners = [(x + 1.5 * radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in angles]
            pen.polygon(corners, fill=_SCRAP_COLOURS[rng.integers(len(_SCRAP_COLOURS))])
            marker.ellipse((x - 1.5 * radius, y - radius, x + 1.5 * radius, y + radius), fill=SCRAP)

    def throw_shadow(self, item: SceneObject) -> None:
        """Darken the floor where the object's shadow falls, away from the light unless defective."""
        strength, direction = _SHADOW[self.defects.shadow]
        if not strength:
            return
        body, (left, _) = self._sprite(item)
        foot = self._foot(item)
        mask = shadow_mask(body.getchannel("A"), direction)
        at = (left - body.width, foot - mask.height + 1)
        self.picture.paste((34, 30, 40), at, mask.point(lambda value: int(value * strength)))
        self.segments.paste(SHADOW, at, mask.point(lambda value: 255 if value > 100 else 0))

    def draw_object(self, item: SceneObject, label: int) -> None:
        body, at = self._sprite(item)
        if item.sunk:
            self._crack_floor(item, label=CRACK)
        self.picture.paste(body, at, body.getchannel("A"))
        self.segments.paste(label, at, _solid(body))

    def interleave(self, left: SceneObject, right: SceneObject, left_label: int) -> None:
        """Make two overlapping objects share space: the lower part of the overlap shows the left one."""
        body, (x, y) = self._sprite(left)
        other, (other_x, other_y) = self._sprite(right)
        cut = max(y, other_y) + round(0.5 * min(body.height, other.height)) - y
        if 0 < cut < body.height:
            lower = body.crop((0, cut, body.width, body.height))
            upper = other.crop((0, 0, other.width, max(0, y + cut - other_y)))
            self.picture.paste(upper, (other_x, other_y), upper.getchannel("A"))
            self.picture.paste(lower, (x, y + cut), lower.getchannel("A"))
            self.segments.paste(left_label + 1, (other_x, other_y), _solid(upper))
            self.segments.paste(left_label, (x, y + cut), _solid(lower))

    def photograph(self, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
        """Crop to the frame, turned by the framing defect."""
        if not self.defects.framing:
            return self.picture, self.segments
        angle = _TILT_DEGREES[self.defects.framing] * self.contrast * (1 if rng.random() < 0.5 else -1)
        box = (self.margin, self.margin, self.margin + self.size, self.margin + self.size)
        picture = self.picture.rotate(angle, Image.Resampling.BICUBIC).crop(box)
        return picture, self.segments.rotate(angle, Image.Resampling.NEAREST).crop(box)

    def _foot(self, item: SceneObject) -> int:
        return self.margin + round(item.base * self.size)

    def _lift(self, item: SceneObject) -> int:
        return round(_FLOAT_GAP[item.floating] * self.contrast * self.size)

    def _sprite(self, item: SceneObject) -> tuple[Image.Image, tuple[int, int]]:
        """The object as drawn (cut where it sinks) and the place of its upper left corner."""
        if item not in self.sprites:
            width = max(4, round(item.width * self.size))
            pattern = min(1.0, _PATTERN[self.defects.texture] * self.contrast)
            body = sprite(item.shape, item.colour, width, pattern)
            hidden = round(_SUNK_SHARE[item.sunk] * min(1.5, self.contrast) * width)
            body = body.crop((0, 0, width, width - hidden))
            left = self.margin + round(item.x * self.size - width / 2)
            self.sprites[item] = body, (left, self._foot(item) - self._lift(item) - body.height)
        return self.sprites[item]

    def _crack_floor(self, item: SceneObject, label: int) -> None:
        """A broken rim around the place where an object sinks into the floor."""
        width = round(item.width * self.size)
        centre = self.margin + round(item.x * self.size)
        foot = self._foot(item) - self._lift(item)
        reach = (0.5 + 0.06 * item.sunk) * width
        box = (centre - reach, foot - 0.14 * width, centre + reach, foot + 0.1 * width)
        ImageDraw.Draw(self.picture).ellipse(box, fill=(52, 44, 44), outline=(236, 226, 210))
        ImageDraw.Draw(self.segments).ellipse(box, fill=label)


def _solid(body: Image.Image) -> Image.Image:
    return body.getchannel("A").point(lambda value: 255 if value > 127 else 0)


def _degrade(
    rng: np.random.Generator, image: Image.Image, defects: Defects, contrast: float
) -> NDArray[np.uint8]:
    """The realism defects that concern the whole picture, in the order lens, sensor, encoder."""
    size = image.width
    if defects.blur:
        image = image.filter(ImageFilter.GaussianBlur(_BLUR[defects.blur] * contrast * size))
    pixels = np.asarray(image, dtype=np.float64)
    if defects.noise:
        deviation = _NOISE[defects.noise] * contrast
        pixels = pixels + deviation * rng.standard_normal(pixels.shape, dtype=np.float32)
    if defects.banding:
        step = 255.0 / (_BAND_LEVELS[defects.banding] - 1)
        banded = np.round(pixels / step) * step
        share = min(1.0, contrast)
        pixels = (1 - share) * pixels + share * banded
    if defects.blocks:
        whole = Image.fromarray(_bytes(pixels))
        coarse = whole.resize((_BLOCKS_PER_SIDE, _BLOCKS_PER_SIDE), Image.Resampling.BOX)
        blocky = np.asarray(coarse.resize((size, size), Image.Resampling.NEAREST), dtype=np.float32)
        share = min(1.0, _BLOCK_SHARE[defects.blocks] * contrast)
        pixels = (1 - share) * pixels + share * blocky
    return _bytes(pixels)


def _bytes(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(pixels, 0, 255), dtype=np.uint8)
