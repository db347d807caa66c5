"""The table of the sets that can be converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from zreward.training.convert.evalmuse import records_from_evalmuse
from zreward.training.convert.genai_bench_ratings import records_from_genai_bench_ratings
from zreward.training.convert.genai_bench_votes import records_from_genai_bench_votes
from zreward.training.convert.hpdv2 import records_from_hpdv2
from zreward.training.convert.hpdv3 import records_from_hpdv3
from zreward.training.convert.imagerewarddb import records_from_imagerewarddb
from zreward.training.convert.pickapic import records_from_pickapic
from zreward.training.convert.records import Outcome, Request
from zreward.training.convert.richhf import records_from_richhf
from zreward.training.convert.visionreward import records_from_visionreward


class Format(NamedTuple):
    """A set.

    Attributes:
        convert: yields what each record of the source becomes.
        preference: whether it only compares images, so that the caller says in which dimension.
        overall: whether it has a rating of no dimension, which the caller may name one for.
        writes_images: whether it holds the images, which are then written to a folder.
        reads_prompts: whether its prompts come from a file of their own.
    """

    convert: Callable[[Request], Iterator[Outcome]]
    preference: bool = False
    overall: bool = False
    writes_images: bool = False
    reads_prompts: bool = False


FORMATS = {
    "hpdv3": Format(records_from_hpdv3, preference=True),
    "hpdv2": Format(records_from_hpdv2, preference=True),
    "pickapic-v2": Format(records_from_pickapic, preference=True, writes_images=True),
    "imagerewarddb": Format(records_from_imagerewarddb, overall=True),
    "richhf-18k": Format(records_from_richhf, overall=True, reads_prompts=True),
    "visionreward-image": Format(records_from_visionreward, writes_images=True),
    "genai-bench-ratings": Format(records_from_genai_bench_ratings),
    "genai-bench-votes": Format(records_from_genai_bench_votes, preference=True, writes_images=True),
    "evalmuse-40k": Format(records_from_evalmuse),
}
