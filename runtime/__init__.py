"""The runtime: scores images with an exported bundle. Needs numpy, pillow, tokenizers and one backend.

from zreward.runtime import Scorer

scorer = Scorer.open("bundle")
scores = scorer.score(prompt="a red fox", images=["a.png", "b.png"])
scores[0]["realism"].mean, scores[0].overall
"""

from __future__ import annotations

from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.score import Score
from zreward.runtime.scorer import Scorer

__all__ = ["GpuOptions", "Score", "Scorer"]
