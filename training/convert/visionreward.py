"""VisionRewardDB-Image: a checklist of 18 graded items for each image.

Parquet with `image`, `prompt` and `annotation`, a struct of whole numbers whose names (with spaces) and ranges are in
the card of huggingface.co/datasets/THUDM/VisionRewardDB-Image. Which items make which dimension is this module's
choice, `CHECKLIST`, by the groups of the card and the questions of the checklist
(`VisionReward_Image/VisionReward_image_qa.txt` in github.com/THUDM/VisionReward):

    aesthetics    composition, colour and light
    realism       clarity, and realism and refinement of detail
    plausibility  body, hands and face of people
    alignment     nothing: the set does not ask about the prompt

Every item is moved linearly from its range onto 1 … 5, and a dimension is the mean of its items. Body, hands, face and
lighting aesthetic have one grade more than their questions tell apart, at the lower end: it says that there is none in
the image, and the item is left out. The two upper grades of a face say that it is beautiful, which is no matter of
plausibility, so they count as no error. Emotion, safety and the unsafe type are no dimension here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zreward.training.convert.image_folder import ImageFolder
from zreward.training.convert.records import Item, LeftOut, Outcome, Record, Request, Row, Scale
from zreward.training.convert.sources import rows_from_source

COLUMNS = ("image", "prompt", "annotation")


class ChecklistItem(NamedTuple):
    """An item's grades: the worst, the best that counts, the best there is, and the one that says "not there"."""

    worst: int
    best: int
    highest: int
    absent: int | None = None


def _graded(worst: int, best: int) -> ChecklistItem:
    return ChecklistItem(worst, best, best)


CHECKLIST = {
    "aesthetics": {
        "symmetry": _graded(-1, 1),
        "object pairing": _graded(-1, 1),
        "main object": _graded(-1, 1),
        "richness": _graded(-2, 2),
        "background": _graded(-1, 2),
        "color brightness": _graded(-1, 1),
        "color aesthetic": _graded(-1, 1),
        "lighting distinction": _graded(-1, 2),
        "lighting aesthetic": ChecklistItem(0, 2, 2, absent=-1),
    },
    "realism": {
        "clarity": _graded(-2, 2),
        "detail realism": _graded(-3, 1),
        "detail refinement": _graded(-4, 2),
    },
    "plausibility": {
        "body": ChecklistItem(-3, 1, 1, absent=-4),
        "hands": ChecklistItem(-3, 1, 1, absent=-4),
        "face": ChecklistItem(-2, 0, 2, absent=-3),
    },
}


def records_from_visionreward(request: Request) -> Iterator[Outcome]:
    """Every image with the dimensions that its checklist speaks of."""
    folder = ImageFolder(request.images)
    for row in rows_from_source(request.source, ".parquet", columns=COLUMNS):
        annotation = row.row("annotation")
        labels = {name: _mean_label(annotation, items) for name, items in CHECKLIST.items()}
        scores = {name: label for name, label in labels.items() if label is not None}
        if not scores:
            yield LeftOut("nothing in its checklist is filled in")
            continue
        yield Record(row.text("prompt"), (Item("", folder.put_content(row, "image"), scores, {}),))


def _mean_label(annotation: Row, items: dict[str, ChecklistItem]) -> float | None:
    """The mean of the items that apply; None if none does."""
    labels = []
    for name, item in items.items():
        if name in annotation.values and name not in annotation:  # null: not filled in
            continue
        grade = annotation.number(name)
        if grade == item.absent:
            continue
        if not item.worst <= grade <= item.highest:
            lowest = item.worst if item.absent is None else item.absent
            raise annotation.error(
                f"{name!r} is {grade:g}, off the set's scale from {lowest} to {item.highest}"
            )
        labels.append(Scale(item.worst, item.best).label(min(grade, item.best)))
    return round(sum(labels) / len(labels), 6) if labels else None
