"""A contact sheet: scored images, best first under each prompt, with a bar chart per dimension.

Numbers hide what a distribution shows at a glance, such as a model that is torn between two levels. The
sheet is drawn with Pillow and its built-in font, so that it looks the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from zreward.distribution import ScoreDistribution

_PAPER, _CARD, _INK, _GREY, _FAINT = "#f3f1ec", "#ffffff", "#23262b", "#7a7f87", "#e4e2dc"
_LOW, _MIDDLE, _HIGH = (201, 74, 83), (233, 180, 76), (46, 148, 128)  # lowest, central and highest bin

_MARGIN = 32  # around the sheet and between prompts
_GAP = 20  # between cards
_PAD = 16  # inside a card
_PICTURE = 288  # side of the square that each image is fitted into
_CARD_WIDTH = _PICTURE + 2 * _PAD
_CHART_WIDTH = (_PICTURE - _PAD) // 2
_CHART_HEIGHT = 52
_CHART_BLOCK = _CHART_HEIGHT + 74  # with title, numbers and axis
_LOWEST_CEILING = 0.4  # a full bar is at least this probability, so that flat distributions look flat
_HEADER = 46  # the line with rank and overall score


@dataclass(frozen=True)
class SheetImage:
    """One scored image; `rank` is 1 for the best of its prompt."""

    image: Image.Image
    rank: int
    overall: float
    distributions: Mapping[str, ScoreDistribution]


@dataclass(frozen=True)
class SheetPrompt:
    """A prompt and its scored images."""

    prompt: str
    images: Sequence[SheetImage]


def draw_contact_sheet(prompts: Sequence[SheetPrompt], *, title: str, columns: int = 4) -> Image.Image:
    """Draw the sheet: per prompt a heading and rows of up to `columns` cards, in the order of rank.

    Titles of dimensions are their names; bars of all charts share one scale, so they can be compared.
    """
    columns = max(1, min(columns, max(len(item.images) for item in prompts)))
    distributions = [d for item in prompts for scored in item.images for d in scored.distributions.values()]
    tallest = max(_LOWEST_CEILING, *(float(d.probs.max()) for d in distributions))
    width = 2 * _MARGIN + columns * _CARD_WIDTH + (columns - 1) * _GAP
    blocks = [_draw_prompt(item, columns, width, tallest) for item in prompts]
    sheet = Image.new("RGB", (width, 92 + sum(block.height for block in blocks)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 30), title, fill=_INK, font=_font(26))
    top = 92
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _draw_prompt(item: SheetPrompt, columns: int, width: int, tallest: float) -> Image.Image:
    ordered = sorted(item.images, key=lambda scored: scored.rank)
    cards = [_draw_card(scored, tallest) for scored in ordered]
    lines = _wrapped(f"“{item.prompt}”", _font(20), width - 2 * _MARGIN)
    heading = 26 * len(lines) + 12
    card_height = max(card.height for card in cards)
    n_rows = -(-len(cards) // columns)
    block = Image.new("RGB", (width, heading + n_rows * (card_height + _GAP) + _MARGIN - _GAP), _PAPER)
    ImageDraw.Draw(block).multiline_text((_MARGIN, 0), "\n".join(lines), fill=_INK, font=_font(20), spacing=6)
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        block.paste(
            card, (_MARGIN + column * (_CARD_WIDTH + _GAP), heading + row * (card_height + _GAP)), _mask(card)
        )
    return block


def _draw_card(scored: SheetImage, tallest: float) -> Image.Image:
    n_rows = -(-len(scored.distributions) // 2)
    top_of_charts = _PAD + _PICTURE + _HEADER
    card = Image.new("RGB", (_CARD_WIDTH, top_of_charts + n_rows * _CHART_BLOCK + 4), _CARD)
    draw = ImageDraw.Draw(card)
    _paste_fitted(card, scored.image)
    baseline = _PAD + _PICTURE + 34
    draw.text((_PAD, baseline), f"#{scored.rank}", fill=_GREY, font=_font(20), anchor="ls")
    draw.text((_CARD_WIDTH - _PAD, baseline), f"{scored.overall:.2f}", fill=_INK, font=_font(26), anchor="rs")
    figure_width = draw.textlength(f"{scored.overall:.2f}", font=_font(26))
    draw.text(
        (_CARD_WIDTH - _PAD - figure_width - 8, baseline), "overall", fill=_GREY, font=_font(14), anchor="rs"
    )
    for index, (name, distribution) in enumerate(scored.distributions.items()):
        row, column = divmod(index, 2)
        left = _PAD + column * (_CHART_WIDTH + _PAD)
        _draw_chart(draw, left, top_of_charts + row * _CHART_BLOCK, name, distribution, tallest)
    return card


def _draw_chart(
    draw: ImageDraw.ImageDraw, left: int, top: int, name: str, distribution: ScoreDistribution, tallest: float
) -> None:
    """A title with mean and spread, one bar per bin, and a mark at the mean."""
    draw.text((left, top + 8), name, fill=_INK, font=_font(14))
    right = left + _CHART_WIDTH
    mean = f"{distribution.mean:.2f}"
    draw.text((left, top + 26), mean, fill=_INK, font=_font(16))
    spread_left = left + draw.textlength(mean, font=_font(16)) + 4
    draw.text((spread_left, top + 28), f"± {distribution.std:.2f}", fill=_GREY, font=_font(13))
    floor = top + 46 + _CHART_HEIGHT
    bins, n = distribution.bins, len(distribution.bins)
    pitch = _CHART_WIDTH / n
    for index, probability in enumerate(distribution.probs):
        x = left + index * pitch
        height = (_CHART_HEIGHT - 4) * float(probability) / tallest
        colour = _ramp(index / max(1, n - 1))
        draw.rectangle((x + 1, floor - max(1.0, height), x + pitch - 2, floor), fill=colour)
    draw.line((left, floor + 1, right, floor + 1), fill=_FAINT, width=1)
    # Bars stand on bin centres, so the mean is placed between the centres of the first and the last.
    share = (distribution.mean - float(bins[0])) / float(bins[-1] - bins[0])
    centre = left + pitch / 2 + share * (_CHART_WIDTH - pitch)
    draw.polygon([(centre, floor + 3), (centre - 4, floor + 10), (centre + 4, floor + 10)], fill=_INK)
    draw.text((left + pitch / 2, floor + 11), f"{bins[0]:g}", fill=_GREY, font=_font(11), anchor="ma")
    draw.text((right - pitch / 2, floor + 11), f"{bins[-1]:g}", fill=_GREY, font=_font(11), anchor="ma")


def _paste_fitted(card: Image.Image, image: Image.Image) -> None:
    """Paste `image` whole, scaled to the picture square and centred in it."""
    scale = _PICTURE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    fitted = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    ImageDraw.Draw(card).rectangle((_PAD, _PAD, _PAD + _PICTURE - 1, _PAD + _PICTURE - 1), fill=_FAINT)
    card.paste(fitted, (_PAD + (_PICTURE - size[0]) // 2, _PAD + (_PICTURE - size[1]) // 2))


def _mask(card: Image.Image) -> Image.Image:
    """Rounded corners, drawn four times larger and reduced, since Pillow does not smooth edges."""
    large = Image.new("L", (card.width * 4, card.height * 4))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), radius=40, fill=255)
    return large.resize(card.size, Image.Resampling.BOX)


def _ramp(position: float) -> tuple[int, int, int]:
    """The colour between low (0), middle (0.5) and high (1)."""
    first, second = (_LOW, _MIDDLE) if position < 0.5 else (_MIDDLE, _HIGH)
    share = position * 2 if position < 0.5 else position * 2 - 1
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` broken between words into lines of at most `width` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
