"""The simulated panel: on the grid, close to the truth on average, and a ceiling that follows its noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from zreward.errors import UsageError
from zreward.metrics import hpa
from zreward.synthetic import DIMENSIONS, SceneConfig, aggregate, annotate, generate, label_noise_ceiling

SMALL = SceneConfig(size=48)


def test_trimming_drops_the_highest_and_the_lowest() -> None:
    assert aggregate(np.array([1.0, 3.0, 3.5, 4.0, 5.0])) == 3.5
    assert aggregate(np.array([1.0, 1.0, 1.0, 1.0, 5.0])) == 1.0
    assert aggregate(np.array([2.0, 2.5, 5.0])) == 2.5


def test_two_annotators_cannot_be_trimmed() -> None:
    with pytest.raises(UsageError, match="at least 3"):
        aggregate(np.array([2.0, 2.5]))


def test_a_panel_without_bias_and_noise_sees_the_truth() -> None:
    exact = dataclasses.replace(SMALL, annotator_bias=0.0, annotator_noise=0.0)
    truth = np.array([[1.0, 2.5, 4.5, 5.0]])
    answers = annotate(np.random.default_rng(0), truth, exact)
    assert np.array_equal(answers, np.repeat(truth[..., None], 5, axis=-1))


def test_annotators_are_nearly_unbiased_in_the_middle_of_the_scale() -> None:
    panel = dataclasses.replace(SMALL, annotators=99)
    answers = annotate(np.random.default_rng(0), np.full((400, 4), 3.0), panel)
    assert np.abs(answers.mean(axis=(0, 2)) - 3.0).max() < 0.08
    one_person = answers.mean(axis=0)
    assert 0.1 < one_person.std() < 0.3  # people differ by about annotator_bias


def test_the_same_people_judge_every_split() -> None:
    quiet = dataclasses.replace(SMALL, annotator_noise=0.0, annotator_bias=1.0)
    truth = np.full((1, 4), 3.0)
    one, other = (annotate(np.random.default_rng(seed), truth, quiet) for seed in (1, 2))
    assert np.array_equal(one, other)
    strangers = dataclasses.replace(quiet, panel_seed=1)
    assert not np.array_equal(one, annotate(np.random.default_rng(1), truth, strangers))


def test_the_ceiling_falls_with_noise_and_is_one_without() -> None:
    scenes = list(generate(SMALL, seed=0, n_prompts=40, candidates=4))
    ceilings = []
    for noise in (0.0, 0.4, 1.5):
        config = dataclasses.replace(SMALL, annotator_bias=0.0, annotator_noise=noise)
        ceilings.append(label_noise_ceiling(scenes, config)["overall"])
    assert ceilings[0] == 1.0
    assert ceilings[0] > ceilings[1] > ceilings[2] > 0.5


def test_the_ceiling_is_the_hpa_of_the_truth() -> None:
    scenes = list(generate(SMALL, seed=3, n_prompts=200, candidates=4))
    ceiling = label_noise_ceiling(scenes, SMALL)
    groups = [scene.index for scene in scenes for _ in scene.candidates]
    for name in DIMENSIONS:
        truth = [c.true_scores[name] for scene in scenes for c in scene.candidates]
        human = [c.human_scores[name] for scene in scenes for c in scene.candidates]
        assert abs(hpa(truth, human, groups).value - ceiling[name]) < 0.03


def test_a_ceiling_without_pairs_is_an_error() -> None:
    scenes = list(generate(SMALL, seed=0, n_prompts=3, candidates=1))
    with pytest.raises(UsageError, match="pairs"):
        label_noise_ceiling(scenes, SMALL)
