"""Descriptions of scenes, and made-up reasons for scores."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward.synthetic import DIMENSIONS, SceneConfig, make_scene
from zreward.synthetic.config import MAX_OBJECTS
from zreward.synthetic.descriptions import LEVELS, WORDS, describe, rationalize
from zreward.synthetic.language import PromptSpec
from zreward.synthetic.truth import BEST, DEFECTS_OF, PENALTY, WORST, AlignmentErrors, alignment_cost

CONFIG = SceneConfig(size=48)


def score_of(text: str, dimension: str, spec: PromptSpec) -> float:
    """The score that a description deserves, read from its words."""
    if dimension in DEFECTS_OF:
        cost = sum(PENALTY[LEVELS.index(word)] for word in text.split()[::2])
    else:
        counts = [int(digit) for digit in re.findall(r"\d", text)]
        cost = alignment_cost(spec, AlignmentErrors(*counts))
    return max(WORST, BEST - cost)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_a_description_tells_the_true_score(index: int) -> None:
    scene = make_scene(CONFIG, 3, index, candidates=1)
    candidate = scene.candidates[0]
    texts = describe(candidate, scene.spec)
    assert tuple(texts) == DIMENSIONS
    for name, text in texts.items():
        assert score_of(text, name, scene.spec) == candidate.true_scores[name]
        assert {word for word in text.split() if not word.isdigit()} <= set(WORDS)


def test_alignment_names_what_is_drawn_and_what_became_of_what_was_asked_for() -> None:
    for index in range(30):
        scene = make_scene(CONFIG, 3, index, candidates=1)
        candidate = scene.candidates[0]
        drawn, asked = describe(candidate, scene.spec)["alignment"].split(" asked ")
        assert drawn == (
            " and ".join(f"{item.colour} {item.shape}" for item in candidate.objects) or "nothing"
        )
        verdicts = re.findall(r"([a-z]+) ([a-z]+) (match|colour|shape|missing)(?: and|(?= \d))", asked)
        wanted = [(group.colour, group.shape) for group in scene.spec.groups for _ in range(group.count)]
        assert [(colour, shape) for colour, shape, _ in verdicts] == wanted
        fates = [fate for _, _, fate in verdicts]
        errors = candidate.alignment_errors
        assert fates.count("missing") == errors.missing
        assert fates.count("colour") + fates.count("shape") == errors.attributes


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_reasons_fit_the_score_and_not_the_picture(dimension: str) -> None:
    """As near to the score as the costs of defects come, and not always the same."""
    spec = make_scene(CONFIG, 3, 1, candidates=1).spec
    for score in (1.0, 2.5, 4.0, 5.0):
        texts = {rationalize(np.random.default_rng(seed), dimension, score, spec) for seed in range(30)}
        found = {score_of(text, dimension, spec) for text in texts}
        assert len(found) == 1
        assert abs(found.pop() - score) <= 0.5
        assert len(texts) > 1 or score > 1.0


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_reasons_could_be_true_of_some_picture(index: int, score: float) -> None:
    """At most three objects are drawn, and a relation is wrong only where the prompt asks for one."""
    spec = make_scene(CONFIG, 3, index, candidates=1).spec
    text = rationalize(np.random.default_rng(index), "alignment", score, spec)
    drawn = text.split(" asked ")[0]
    assert drawn == "nothing" or len(drawn.split(" and ")) <= MAX_OBJECTS
    assert spec.relation or text.endswith("0 relation")
