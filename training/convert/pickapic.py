"""Pick-a-Pic v2: pairs that a user of the Pick-a-Pic site chose from; version 1 has the same columns.

Parquet with `caption`, `jpg_0` and `jpg_1` (encoded images), `label_0` and `label_1` (1 for the chosen image, 0 for
the other, 0.5 each for a tie), `has_label`, `image_0_uid` and `image_1_uid`; `best_image_uid` repeats the labels and
is not read. From the cards of huggingface.co/datasets/yuvalkirstain/pickapic_v2 and pickapic_v1, and the trainer in
github.com/yuvalkirstain/PickScore, which drops rows without `has_label` as this does.

Images are written under their uid, by which RichHF-18K names them.
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.training.convert.image_folder import ImageFolder
from zreward.training.convert.records import SHARE, LeftOut, Outcome, Record, Request, voted_item
from zreward.training.convert.sources import rows_from_source

COLUMNS = (
    "caption",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "has_label",
    "image_0_uid",
    "image_1_uid",
)


def records_from_pickapic(request: Request) -> Iterator[Outcome]:
    """Every labelled pair, sides 0 and 1 as in the columns."""
    dimension = request.voted
    folder = ImageFolder(request.images)
    for row in rows_from_source(request.source, ".parquet", columns=COLUMNS):
        if not row["has_label"]:
            yield LeftOut("has_label is false")
            continue
        if row.text("image_0_uid") == row.text("image_1_uid"):
            yield LeftOut("both images are the same one")
            continue
        for name in ("label_0", "label_1"):
            row.label(name, SHARE)
        votes = [float(row["label_0"]), float(row["label_1"])]
        if sum(votes) != 1.0:
            raise row.error(f"'label_0' and 'label_1' must add up to 1; found {votes[0]:g} and {votes[1]:g}")
        items = [
            voted_item(
                side,
                folder.put_named(row, f"jpg_{side}", row.text(f"image_{side}_uid")),
                dimension,
                votes[int(side)],
                1.0 - votes[int(side)],
            )
            for side in ("0", "1")
        ]
        yield Record(row.text("caption"), tuple(items))
