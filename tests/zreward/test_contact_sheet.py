"""The contact sheet: what is drawn where; whether it is pleasant is for eyes to judge."""

from __future__ import annotations

import numpy as np
from PIL import Image

from zreward.contact_sheet import SheetImage, SheetPrompt, draw_contact_sheet
from zreward.distribution import ScoreDistribution

BINS = np.arange(1.0, 5.5, 0.5)


def scored(colour: str, rank: int, *, size: tuple[int, int] = (80, 80), dimensions: int = 4) -> SheetImage:
    flat = ScoreDistribution(BINS, np.full(9, 1 / 9))
    return SheetImage(Image.new("RGB", size, colour), rank, 3.0, {f"d{i}": flat for i in range(dimensions)})


def colours_along(sheet: Image.Image, row: int) -> list[tuple[int, int, int]]:
    """The pure colours met on one row of pixels, from left to right, each once."""
    pixels = [tuple(pixel) for pixel in np.asarray(sheet)[row].tolist()]
    pure = {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
    return list(dict.fromkeys(pixel for pixel in pixels if pixel in pure))


def test_best_image_comes_first() -> None:
    images = [scored("#f00", 3), scored("#0f0", 1), scored("#00f", 2)]
    sheet = draw_contact_sheet([SheetPrompt("three flat pictures", images)], title="test")
    assert colours_along(sheet, 300) == [(0, 255, 0), (0, 0, 255), (255, 0, 0)]


def test_every_image_shows_whatever_its_shape_and_number_of_dimensions() -> None:
    images = [scored("#f00", 1, size=(400, 10)), scored("#0f0", 2, size=(1, 90), dimensions=3)]
    prompts = [SheetPrompt("a long prompt " * 40, images), SheetPrompt("short", [scored("#00f", 1)])]
    sheet = draw_contact_sheet(prompts, title="test")
    colours = {tuple(pixel) for pixel in np.asarray(sheet).reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours


def test_more_probable_bins_have_taller_bars() -> None:
    def ink(probs: list[float]) -> int:
        distribution = ScoreDistribution(BINS, probs)
        image = SheetImage(Image.new("RGB", (8, 8)), 1, 3.0, {"realism": distribution})
        sheet = np.asarray(draw_contact_sheet([SheetPrompt("p", [image])], title="t"))
        return int((sheet == (46, 148, 128)).all(axis=-1).sum())  # the colour of the highest bin

    assert ink([0, 0, 0, 0, 0.5, 0, 0, 0, 0.5]) > ink([0, 0, 0, 0, 0.9, 0, 0, 0, 0.1]) > 0
