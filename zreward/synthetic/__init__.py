"""Procedural scenes whose four rubric scores are known.

The reference student is trained on them and the demo, the tests and the quantization gate score them.
`docs/synthetic.md` shows what is drawn and how it is scored.
"""

from __future__ import annotations

from zreward.synthetic.annotators import aggregate, annotate, label_noise_ceiling
from zreward.synthetic.config import DIMENSIONS, SceneConfig
from zreward.synthetic.dataset import write_dataset
from zreward.synthetic.language import PromptSpec
from zreward.synthetic.scenes import Candidate, Scene, generate, make_scene
from zreward.synthetic.truth import Defects, SceneObject, alignment_score, defect_score, true_scores

__all__ = [
    "DIMENSIONS",
    "Candidate",
    "Defects",
    "PromptSpec",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "aggregate",
    "alignment_score",
    "annotate",
    "defect_score",
    "generate",
    "label_noise_ceiling",
    "make_scene",
    "true_scores",
    "write_dataset",
]
