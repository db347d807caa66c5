"""`Scorer`: kinds of images, order, errors of single items, the prompt cache, threads."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from zreward.errors import BackendError, BundleError, ImageError, PromptError, UsageError, ZrewardError
from zreward.image import preprocess
from zreward.runtime import Score, Scorer
from zreward.runtime.engine import Answers, Engine

SIZES = [(64, 64), (48, 96), (96, 48), (33, 47)]


def noise(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (*SIZES[index % len(SIZES)], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def probs_of(score: Score | ZrewardError) -> NDArray[np.float64]:
    assert isinstance(score, Score)
    return np.array([score[name].probs for name in score])


def assert_same(first: Score | ZrewardError, second: Score | ZrewardError, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(probs_of(first), probs_of(second), atol=atol, rtol=0)


@pytest.fixture
def prompt_runs(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the decoder ran, in order."""
    runs: list[str] = []
    run = Engine.prompt_state

    def recorded(engine: Engine, prompt: str) -> Any:
        runs.append(prompt)
        return run(engine, prompt)

    monkeypatch.setattr(Engine, "prompt_state", recorded)
    return runs


# --- images and results


def test_every_kind_of_image_scores_the_same(scorer: Scorer, tmp_path: Path) -> None:
    picture = noise(1)
    path = tmp_path / "picture.png"
    picture.save(path)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    kinds = [path, str(path), buffer.getvalue(), picture, np.asarray(picture)]
    scores = scorer.score(prompt="a red fox", images=kinds)
    for score in scores[1:]:
        np.testing.assert_allclose(probs_of(score), probs_of(scores[0]), atol=1e-6)


def test_a_score_reads_as_a_mapping(scorer: Scorer) -> None:
    score = scorer.score(prompt="a red fox", images=[noise(0)])[0]
    names = scorer.bundle.contract.dimension_names
    assert tuple(score) == names and len(score) == 4
    assert score.overall == pytest.approx(np.mean([score[n].mean for n in names]))
    assert score.label_mass is not None and set(score.label_mass) == set(names)
    assert all(0 <= mass <= 1 for mass in score.label_mass.values())
    assert "realism" in score and "humour" not in score and score.get("humour") is None
    with pytest.raises(UsageError) as caught:
        score["humour"]
    assert str(caught.value) == f"no dimension 'humour'; this bundle scores {', '.join(names)}"


def test_arguments_are_keywords(scorer: Scorer) -> None:
    """So that nobody can swap prompt and images, as HPSv3's users did."""
    with pytest.raises(TypeError):
        scorer.score("a red fox", [noise(0)])  # type: ignore[misc]
    with pytest.raises(TypeError):
        scorer.rank("a red fox", [noise(0)])  # type: ignore[misc]


@pytest.mark.parametrize(
    "images", ["a.png", b"\x89PNG", Path("a.png"), noise(0), np.zeros((8, 8, 3), np.uint8), None]
)
def test_a_single_image_is_not_a_list(scorer: Scorer, images: Any) -> None:
    with pytest.raises(UsageError, match=r"pass \[image\]"):
        scorer.score(prompt="a red fox", images=images)


def test_no_images_no_scores(scorer: Scorer) -> None:
    assert scorer.score(prompt="a red fox", images=[]) == []


# --- order and errors


def test_order_is_kept_over_chunks_of_mixed_prompts_and_sizes(scorer: Scorer) -> None:
    prompts = ["a red fox", "two lazy dogs", "a tall grey tower"]
    pairs = [(prompts[(i * 7) % 3], noise(i)) for i in range(21)]
    together = scorer.score_pairs(pairs)
    assert len(together) == len(pairs)
    for (prompt, image), score in zip(pairs, together, strict=True):
        assert_same(score, scorer.score(prompt=prompt, images=[image])[0])


def test_a_broken_image_in_the_middle(scorer: Scorer, tmp_path: Path) -> None:
    images: list[Any] = [noise(0), noise(4), tmp_path / "missing.png", noise(8), b"not an image", noise(1)]
    results = scorer.score(prompt="a red fox", images=images, errors="return")
    assert [isinstance(r, ImageError) for r in results] == [False, False, True, False, True, False]
    assert "missing.png" in str(results[2])
    for index in (0, 1, 3, 5):
        assert_same(results[index], scorer.score(prompt="a red fox", images=[images[index]])[0])
    with pytest.raises(ImageError, match=r"missing\.png"):
        scorer.score(prompt="a red fox", images=images)


def test_a_broken_prompt_among_pairs(scorer: Scorer) -> None:
    prompts: list[Any] = ["a red fox", "", "two dogs", None, ["a list"], "a red fox"]
    results = scorer.score_pairs([(prompt, noise(0)) for prompt in prompts], errors="return")
    assert [isinstance(r, PromptError) for r in results] == [False, True, False, True, True, False]
    assert_same(results[0], results[5])


@pytest.mark.parametrize("pairs", ["a fox", [("a fox",)], [noise(0)], iter([("a fox", noise(0))])])
def test_pairs_that_are_none(scorer: Scorer, pairs: Any) -> None:
    with pytest.raises(UsageError, match="list of \\(prompt, image\\) tuples"):
        scorer.score_pairs(pairs)


def test_a_small_memory_bound_splits_batches_and_changes_no_score(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [noise(0).rotate(90 * turn) for turn in range(4)]
    together = scorer.score(prompt="a fox", images=images)
    rows: list[int] = []
    run = Engine.answer

    def recorded(engine: Engine, state: Any, dimensions: Any = None) -> Answers:
        answers = run(engine, state, dimensions)
        rows.append(len(answers.probs))
        return answers

    monkeypatch.setattr(Engine, "answer", recorded)
    monkeypatch.setattr("zreward.runtime.engine.MAX_STATE_BYTES", 1)
    alone = scorer.score(prompt="a fox", images=images)
    assert rows == [1, 1, 1, 1]
    for first, second in zip(together, alone, strict=True):
        assert_same(first, second)


def test_images_of_the_next_batch_are_prepared_while_the_model_works(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, lock, all_ready = [], threading.Lock(), threading.Event()
    prepare, encode = preprocess, Engine.encode_image

    def counted(image: Any, spec: Any) -> Any:
        result = prepare(image, spec)
        with lock:
            prepared.append(threading.current_thread().name)
            if len(prepared) == 10:
                all_ready.set()
        return result

    def waiting(engine: Engine, patches: Any) -> Any:
        assert all_ready.wait(timeout=30), f"only {len(prepared)} of 10 images are ready"
        return encode(engine, patches)

    monkeypatch.setattr("zreward.runtime.scorer.preprocess", counted)
    monkeypatch.setattr(Engine, "encode_image", waiting)
    assert len(scorer.score(prompt="a red fox", images=[noise(0)] * 10)) == 10
    assert all(name.startswith("zreward-preprocess") for name in prepared)


def test_what_was_prepared_ahead_is_dropped_with_the_first_failure(scorer: Scorer) -> None:
    with pytest.raises(ImageError):
        scorer.score(prompt="a red fox", images=[b"no image", *[noise(0)] * 20])
    assert (
        len(scorer.score(prompt="a red fox", images=[noise(0)])) == 1
    )  # and the next call is none the worse


def test_an_unknown_way_to_treat_errors(scorer: Scorer) -> None:
    with pytest.raises(UsageError, match="'raise' or 'return'"):
        scorer.score_pairs([], errors="ignore")  # type: ignore[call-overload]


@pytest.mark.parametrize("broken", ["nan", "inf", "unnormalized", "negative", "label mass"])
def test_answers_that_are_no_distribution_are_that_items_error(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    answer = Engine.answer

    def broken_answer(engine: Engine, state: Any) -> Answers:
        answers = answer(engine, state)
        assert answers.label_mass is not None
        spoil: dict[str, Callable[[NDArray[np.float32]], None]] = {
            "nan": lambda probs: probs.fill(np.nan),
            "inf": lambda probs: probs.fill(np.inf),
            "unnormalized": lambda probs: probs.fill(1.0),
            "negative": lambda probs: probs.__setitem__((slice(None), 0), -0.5),
            "label mass": lambda probs: answers.label_mass.__setitem__(1, np.nan),  # type: ignore[union-attr]
        }
        spoil[broken](answers.probs[1])
        return answers

    monkeypatch.setattr(Engine, "answer", broken_answer)
    images = [noise(0), noise(4), noise(8)]  # one size, so one batch
    results = scorer.score(prompt="a red fox", images=images, errors="return")
    assert [type(r) for r in results] == [Score, BackendError, Score]
    with pytest.raises(BackendError):
        scorer.score(prompt="a red fox", images=images)


def test_a_backend_failure_is_the_error_of_its_batch_alone(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Engine.encode_image

    def fail_on_wide(engine: Engine, patches: Any) -> Any:
        if patches.grid_thw[2] > patches.grid_thw[1]:
            raise BackendError("out of memory")
        return encode(engine, patches)

    monkeypatch.setattr(Engine, "encode_image", fail_on_wide)
    results = scorer.score(prompt="a red fox", images=[noise(0), noise(1), noise(2)], errors="return")
    assert [type(r) for r in results] == [Score, BackendError, Score]


# --- ranking


def test_rank_orders_by_overall_and_keeps_ties(scorer: Scorer) -> None:
    images = [noise(index) for index in (3, 0, 1, 0, 2)]
    order = scorer.rank(prompt="a red fox", images=images)
    overall = [score.overall for score in scorer.score(prompt="a red fox", images=images)]
    assert sorted(order) == list(range(5))
    assert all(overall[a] >= overall[b] - 1e-5 for a, b in itertools.pairwise(order))
    assert len(set(np.round(overall, 4))) == 4  # two images are equal, and no others

    same = scorer.rank(prompt="a red fox", images=[noise(0)] * 3)
    assert same == [0, 1, 2]


def test_rank_raises_rather_than_ranking_a_failure(scorer: Scorer) -> None:
    with pytest.raises(ImageError):
        scorer.rank(prompt="a red fox", images=[noise(0), b"not an image"])


# --- the prompt cache


def test_a_cached_prompt_is_not_run_again_and_scores_the_same(scorer: Scorer, prompt_runs: list[str]) -> None:
    first = scorer.score(prompt="a red fox", images=[noise(0)])[0]
    again = scorer.score(prompt="a red fox", images=[noise(0)])[0]
    assert prompt_runs == ["a red fox"]
    np.testing.assert_array_equal(probs_of(first), probs_of(again))


def test_the_cache_keeps_the_last_four_prompts(scorer: Scorer, prompt_runs: list[str]) -> None:
    for prompt in ("a", "b", "c", "d", "a", "e"):  # e displaces b, which was used longest ago
        scorer.score(prompt=prompt, images=[noise(0)])
    prompt_runs.clear()
    for prompt in ("a", "c", "d", "e"):
        scorer.score(prompt=prompt, images=[noise(0)])
    assert prompt_runs == []
    scorer.score(prompt="b", images=[noise(0)])
    assert prompt_runs == ["b"]
    assert len(scorer._prompts) == 4


def test_each_prompt_runs_once_where_there_are_more_than_the_cache_holds(
    scorer: Scorer, prompt_runs: list[str]
) -> None:
    """Eight prompts and two sizes in turn, all in one chunk."""
    prompts = [f"scene {n}" for n in (0, 1, 2, 3, 4, 5, 0, 1)]
    scorer.score_pairs([(prompt, noise(i // 6)) for i, prompt in enumerate(prompts)])
    assert sorted(prompt_runs) == [f"scene {n}" for n in range(6)]


def test_a_broken_image_costs_no_decoder_run(scorer: Scorer, prompt_runs: list[str]) -> None:
    scorer.score(prompt="a red fox", images=[b"not an image"], errors="return")
    assert prompt_runs == []


# --- opening and closing


def test_a_closed_scorer_says_so(tiny_bundle: Path) -> None:
    with Scorer.open(tiny_bundle) as scorer:
        scorer.score(prompt="a red fox", images=[noise(0)])
    for use in (lambda: scorer.score(prompt="a red fox", images=[noise(0)]), lambda: scorer.bundle):
        with pytest.raises(UsageError, match="closed"):
            use()
    assert not scorer._prompts
    scorer.close()


def test_closing_while_another_thread_scores(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running call ends well, and the closed scorer keeps none of its memory."""
    scorer = Scorer.open(tiny_bundle)
    run = Engine.prompt_state

    def close_in_the_middle(engine: Engine, prompt: str) -> Any:
        scorer.close()
        return run(engine, prompt)

    monkeypatch.setattr(Engine, "prompt_state", close_in_the_middle)
    assert len(scorer.score(prompt="a red fox", images=[noise(0)])) == 1
    assert not scorer._prompts


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Scorer.open(tmp_path)


# --- threads


def test_one_and_two_threads_agree(tiny_bundle: Path) -> None:
    images = [noise(index) for index in range(4)]
    with Scorer.open(tiny_bundle, threads=1) as one, Scorer.open(tiny_bundle, threads=2) as two:
        for first, second in zip(
            one.score(prompt="a red fox", images=images),
            two.score(prompt="a red fox", images=images),
            strict=True,
        ):
            assert_same(first, second)


def test_four_threads_at_once_get_what_one_gets(tiny_bundle: Path) -> None:
    """More prompts than the cache holds, so that threads displace each other's."""
    jobs = [[(f"scene {(i + j) % 6}", noise(i + j)) for j in range(3)] for i in range(8)]
    with Scorer.open(tiny_bundle, threads=1) as scorer:
        expected = [scorer.score_pairs(job) for job in jobs]
    with Scorer.open(tiny_bundle, threads=1) as shared, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(shared.score_pairs, jobs))
    for scores, others in zip(expected, found, strict=True):
        for first, second in zip(scores, others, strict=True):
            assert_same(first, second, atol=1e-6)
