"""Latent scores: hand-checked alignment, and defects that never raise a score or leave no trace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zreward.errors import UsageError
from zreward.synthetic import Defects, SceneConfig, SceneObject, alignment_score, defect_score
from zreward.synthetic.language import RELATIONS, Group, PromptSpec, sample_spec, sentence
from zreward.synthetic.layout import sample_objects
from zreward.synthetic.render import render
from zreward.synthetic.truth import DEFECTS_OF, matched_objects, relations_held

RED_CUBES_LEFT_OF_BALL = PromptSpec((Group(2, "red", "cube"), Group(1, "blue", "ball")), "left")
SEVERITIES = st.integers(0, 3)
DEFECTS = st.builds(Defects, **{field.name: SEVERITIES for field in dataclasses.fields(Defects)})


def item(colour: str, shape: str, x: float, base: float = 0.8) -> SceneObject:
    return SceneObject(colour, shape, x, base, 0.3)


@pytest.mark.parametrize(
    "objects, score",
    [
        ([item("red", "cube", 0.2), item("red", "cube", 0.4), item("blue", "ball", 0.8)], 5.0),
        ([item("red", "cube", 0.2), item("green", "cube", 0.4), item("blue", "ball", 0.8)], 4.0),
        ([item("red", "cube", 0.2), item("red", "cube", 0.9), item("blue", "ball", 0.5)], 3.5),
        ([item("red", "cube", 0.2), item("blue", "ball", 0.8)], 3.5),
        ([item("red", "cube", 0.2), item("red", "cube", 0.4)], 3.5),
        ([item("red", "cube", 0.2), item("green", "cone", 0.4), item("blue", "ball", 0.8)], 3.5),
        ([], 1.0),
    ],
)
def test_alignment_of_two_red_cubes_left_of_a_blue_ball(objects: list[SceneObject], score: float) -> None:
    assert alignment_score(RED_CUBES_LEFT_OF_BALL, objects) == score


@pytest.mark.parametrize("relation, score", [("front", 5.0), ("behind", 3.5), ("left", 5.0), ("right", 3.5)])
def test_each_relation_is_checked(relation: str, score: float) -> None:
    spec = PromptSpec((Group(1, "red", "cone"), Group(1, "green", "ball")), relation)
    drawn = [item("red", "cone", 0.2, base=0.93), item("green", "ball", 0.7, base=0.7)]
    assert alignment_score(spec, drawn) == score


def test_relations_are_known_whether_or_not_they_are_asked_for() -> None:
    cone, ball = Group(1, "red", "cone"), Group(1, "green", "ball")
    drawn = [item("green", "ball", 0.7, base=0.7), item("red", "cone", 0.2, base=0.93)]
    for spec, held in (
        (PromptSpec((cone, ball)), {"left", "front"}),
        (PromptSpec((cone, ball), "right"), {"left", "front"}),
        (PromptSpec((ball, cone)), {"right", "behind"}),
    ):
        known = relations_held(spec, matched_objects(spec, drawn))
        assert (
            known is not None
            and {name for name, holds in zip(RELATIONS, known, strict=True) if holds} == held
        )


def test_one_group_or_a_missing_one_stands_in_no_relation() -> None:
    cone, ball = Group(1, "red", "cone"), Group(1, "green", "ball")
    for spec, drawn in (
        (PromptSpec((cone,)), [item("red", "cone", 0.2)]),
        (PromptSpec((cone, ball)), [item("red", "cone", 0.2)]),
        (PromptSpec((cone, ball)), []),
    ):
        assert relations_held(spec, matched_objects(spec, drawn)) is None


def test_the_order_of_drawn_objects_does_not_matter() -> None:
    drawn = [item("red", "cube", 0.2), item("green", "cone", 0.4), item("blue", "ball", 0.8)]
    assert alignment_score(RED_CUBES_LEFT_OF_BALL, drawn) == alignment_score(
        RED_CUBES_LEFT_OF_BALL, drawn[::-1]
    )


@given(defects=DEFECTS, name=st.sampled_from([n for names in DEFECTS_OF.values() for n in names]))
def test_a_worse_defect_never_gets_a_higher_score(defects: Defects, name: str) -> None:
    worse = dataclasses.replace(defects, **{name: min(3, getattr(defects, name) + 1)})
    for dimension, names in DEFECTS_OF.items():
        before, after = defect_score(defects, dimension), defect_score(worse, dimension)
        assert after <= before if name in names else after == before


@pytest.mark.parametrize("name", [n for names in DEFECTS_OF.values() for n in names])
def test_every_severity_of_every_defect_changes_the_picture(name: str) -> None:
    config = SceneConfig(edit_weights=(1.0,))
    spec = PromptSpec((Group(2, "red", "cube"),))
    pictures = []
    for level in range(4):
        defects = Defects(**{name: level})
        objects = sample_objects(np.random.default_rng(4), spec, defects, config)
        pictures.append(render(np.random.default_rng(4), objects, defects, config).image.astype(int))
    for one in range(4):
        for other in range(one):
            assert np.abs(pictures[one] - pictures[other]).mean() > 0.05, (one, other)


@given(seed=st.integers(0, 10_000), limit=st.integers(1, 3))
def test_specs_keep_the_limit_and_become_sentences(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, limit, 0.5)
    text = sentence(rng, spec)
    assert 1 <= spec.n_objects <= limit
    assert all(group.colour in text for group in spec.groups)
    assert len({(g.colour, g.shape) for g in spec.groups}) == len(spec.groups)


def test_a_severity_outside_the_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="blur"):
        Defects(blur=4)


def test_alignment_is_not_a_defect_dimension() -> None:
    with pytest.raises(UsageError, match=r"alignment.*realism"):
        defect_score(Defects(), "alignment")
