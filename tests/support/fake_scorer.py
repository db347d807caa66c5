"""A scorer that reads images and prompts as the real one does, and makes its scores up from the pixels."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from zreward.contract import ScoreContract
from zreward.distribution import ScoreDistribution
from zreward.errors import PromptError, ZrewardError
from zreward.image import ImageInput, ImageSpec, preprocess

SMALL = ImageSpec(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64)


class FakeScore:
    def __init__(self, distributions: dict[str, ScoreDistribution]) -> None:
        self.dimensions = distributions
        self.overall = float(np.mean([d.mean for d in distributions.values()]))

    def __getitem__(self, name: str) -> ScoreDistribution:
        return self.dimensions[name]

    def to_dict(self) -> dict[str, Any]:
        dimensions = {
            name: {"mean": d.mean, "std": d.std, "probs": d.probs.tolist()}
            for name, d in self.dimensions.items()
        }
        return {"dimensions": dimensions, "overall": self.overall}


class FakeScorer:
    """Stands in for `zreward.runtime.Scorer` where only the order and the errors of results matter."""

    def __init__(self, *, bundle_sha256: str = "ab" * 32, seconds_per_chunk: float = 0.0) -> None:
        self.contract = ScoreContract.default(image=SMALL)
        self.bundle = SimpleNamespace(sha256=bundle_sha256, contract=self.contract)
        self.largest_chunk = 0
        self._seconds_per_chunk = seconds_per_chunk

    def score_pairs(
        self, pairs: Sequence[tuple[str, ImageInput]], *, errors: str
    ) -> list[FakeScore | ZrewardError]:
        assert errors == "return"
        time.sleep(self._seconds_per_chunk)
        self.largest_chunk = max(self.largest_chunk, len(pairs))
        return [self._score(prompt, image) for prompt, image in pairs]

    def _score(self, prompt: str, image: ImageInput) -> FakeScore | ZrewardError:
        try:
            if not prompt.strip():
                raise PromptError("the prompt is empty")
            brightness = float(preprocess(image, self.contract.image).pixel_values.mean())
        except ZrewardError as error:
            return error
        logits = -np.abs(np.array(self.contract.bins) - 3 - 2 * brightness - len(prompt) % 3)
        distribution = ScoreDistribution.from_logits(self.contract.bins, logits)
        return FakeScore(dict.fromkeys(self.contract.dimension_names, distribution))


def main() -> None:
    """Score INPUT into OUTPUT, slowly enough to be killed in the middle."""
    from zreward.runtime.jsonl import score_jsonl

    source, output, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    score_jsonl(FakeScorer(seconds_per_chunk=seconds), source, output)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
