"""GenAI-Bench of TIGER-Lab: votes of GenAI-Arena between two generated images.

Parquet (`image_generation/*.parquet`) with `prompt`, `left_image`, `right_image` and `vote_type`, one of leftvote,
rightvote, tievote and bothbad_vote. From `inference.py` and `inference_configs.json` of
github.com/TIGER-AI-Lab/GenAI-Bench, and the card of huggingface.co/datasets/tianleliphoebe/GenAI-Arena-Bench-3, which
has the same 1,735 rows. The sets for editing and for video have other columns and are refused.

A tie is half a vote for each. So is "both are bad": a preference says nothing about how good two equals are.
"""

from __future__ import annotations

from collections.abc import Iterator

from zreward.training.convert.image_folder import ImageFolder
from zreward.training.convert.records import Outcome, Record, Request, voted_item
from zreward.training.convert.sources import rows_from_source

COLUMNS = ("prompt", "left_image", "right_image", "vote_type")

SHARE_OF_LEFT = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}


def records_from_genai_bench_votes(request: Request) -> Iterator[Outcome]:
    """Every vote, with sides left and right."""
    dimension = request.voted
    folder = ImageFolder(request.images)
    for row in rows_from_source(request.source, ".parquet", columns=COLUMNS):
        vote = row.text("vote_type")
        if vote not in SHARE_OF_LEFT:
            raise row.error(f"'vote_type' is {vote!r}; known are {', '.join(SHARE_OF_LEFT)}")
        left = SHARE_OF_LEFT[vote]
        items = (
            voted_item("left", folder.put_content(row, "left_image"), dimension, left, 1 - left),
            voted_item("right", folder.put_content(row, "right_image"), dimension, 1 - left, left),
        )
        yield Record(row.text("prompt"), items)
