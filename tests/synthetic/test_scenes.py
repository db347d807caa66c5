"""Scenes are deterministic, on the grid, fast enough, and say no to bad arguments."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from zreward.errors import UsageError
from zreward.synthetic import DIMENSIONS, Scene, SceneConfig, generate, make_scene
from zreward.synthetic.render import FIRST_OBJECT

BINS = {1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(generate(SceneConfig(), seed=5, n_prompts=60, candidates=4))


def test_the_same_seed_gives_the_same_pixels_and_scores(scenes: list[Scene]) -> None:
    for scene in scenes[:5]:
        again = make_scene(SceneConfig(), 5, scene.index, 4)
        assert again.prompt == scene.prompt
        for one, other in zip(scene.candidates, again.candidates, strict=True):
            assert np.array_equal(one.image, other.image)
            assert one.annotator_scores == other.annotator_scores


def test_another_seed_gives_other_scenes(scenes: list[Scene]) -> None:
    other = list(generate(SceneConfig(), seed=6, n_prompts=60, candidates=1))
    assert sum(a.prompt == b.prompt for a, b in zip(scenes, other, strict=True)) < 10


def test_a_scene_does_not_depend_on_how_many_are_made(scenes: list[Scene]) -> None:
    first = next(iter(generate(SceneConfig(), seed=5, n_prompts=1, candidates=2)))
    assert np.array_equal(first.candidates[1].image, scenes[0].candidates[1].image)


def test_all_scores_lie_on_the_nine_bins(scenes: list[Scene]) -> None:
    for candidate in (c for scene in scenes for c in scene.candidates):
        for name in DIMENSIONS:
            assert candidate.true_scores[name] in BINS
            assert candidate.human_scores[name] in BINS
            assert set(candidate.annotator_scores[name]) <= BINS


def test_prompts_and_scores_are_varied(scenes: list[Scene]) -> None:
    assert len({scene.prompt for scene in scenes}) > 50
    for name in DIMENSIONS:
        assert len({c.true_scores[name] for scene in scenes for c in scene.candidates}) >= 7


def test_a_candidate_without_edits_is_perfectly_aligned() -> None:
    config = SceneConfig(edit_weights=(1.0,), size=48)
    for scene in generate(config, seed=1, n_prompts=80, candidates=2):
        assert all(c.true_scores["alignment"] == 5.0 for c in scene.candidates), scene.prompt


@pytest.mark.parametrize("size", [48, 96, 160])
def test_images_have_the_size_that_is_asked_for(size: int) -> None:
    candidate = make_scene(SceneConfig(size=size), 0, 0, 1).candidates[0]
    assert candidate.image.shape == (size, size, 3) and candidate.image.dtype == np.uint8
    assert candidate.segments.shape == (size, size)


def test_every_drawn_object_can_be_seen_in_the_segments() -> None:
    calm = SceneConfig(defect_rate=0.0)
    for scene in generate(calm, seed=2, n_prompts=40, candidates=2):
        for candidate in scene.candidates:
            seen = {int(v) - FIRST_OBJECT for v in np.unique(candidate.segments) if v >= FIRST_OBJECT}
            assert seen == set(range(len(candidate.objects)))


def test_generation_is_fast() -> None:
    started = time.process_time()
    list(generate(SceneConfig(), seed=3, n_prompts=25, candidates=8))
    per_minute = 200 / (time.process_time() - started) * 60
    assert per_minute > 2_000


def test_config_survives_its_json_form() -> None:
    config = SceneConfig(size=96, edit_weights=(0.5, 0.5))
    assert SceneConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", 20),
        ("size", 96.0),
        ("max_objects", 4),
        ("object_scale", 0.0),
        ("defect_contrast", float("nan")),
        ("defect_rate", 1.5),
        ("relation_rate", -0.1),
        ("annotators", 2),
        ("annotator_noise", -1.0),
        ("edit_weights", ()),
        ("edit_weights", (0.0, 0.0)),
        ("panel_seed", True),
    ],
)
def test_a_bad_knob_is_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(SceneConfig(), **{field: value})


def test_an_unknown_knob_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'colour'.*defect_contrast"):
        SceneConfig.from_dict({"colour": 1})


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"n_prompts": 0}, {"candidates": 0}])
def test_bad_counts_are_refused_at_the_call(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(arguments))):
        generate(SceneConfig(), **{"seed": 0, "n_prompts": 1, "candidates": 1, **arguments})
