"""The engine's stages: states that continue each other, padding, and a bundle whose parts do not fit."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.bundles import accept_changes
from zreward.bundle import Bundle, EmbeddingInfo
from zreward.errors import BackendError, PromptError, UsageError
from zreward.image import preprocess
from zreward.runtime import Scorer
from zreward.runtime.engine import DecoderState, Engine


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Engine:
    return Engine(Bundle.open(tiny_bundle), threads=1)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_state(engine: Engine, prompt: str, *images: Image.Image) -> DecoderState:
    patches = [preprocess(image, engine.contract.image) for image in images]
    grid = (patches[0].grid_thw[1] // 2, patches[0].grid_thw[2] // 2)
    return engine.image_state(engine.prompt_state(prompt), [engine.encode_image(p) for p in patches], grid)


def test_states_count_tokens_and_positions(engine: Engine) -> None:
    prompt = engine.prompt_state("a red fox")
    ids = engine.encoder.text_prefix_ids("a red fox")
    assert prompt.length == prompt.position == len(ids)
    image = image_state(engine, "a red fox", noise(48, 96))  # 3 × 6 tokens and the closing one
    assert image.length == len(ids) + 19 and image.position == len(ids) + 7
    for info in engine.bundle.manifest.states:
        sizes = {"batch": 1, "state_batch": 1, "past": image.length}
        expected = tuple(sizes[d] if isinstance(d, str) else d for d in info.shape)
        assert image.arrays[info.input].shape == expected
        assert image.arrays[info.input].dtype == info.dtype


def test_running_from_a_state_does_not_change_it(engine: Engine) -> None:
    prompt = engine.prompt_state("a red fox")
    before = {name: array.copy() for name, array in prompt.arrays.items()}
    features = engine.encode_image(preprocess(noise(64, 64), engine.contract.image))
    first = engine.answer(engine.image_state(prompt, [features], (4, 4))).probs
    second = engine.answer(engine.image_state(prompt, [features], (4, 4))).probs
    np.testing.assert_array_equal(first, second)
    for name, array in prompt.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_answers_are_per_image_and_dimension(engine: Engine) -> None:
    images = [noise(64, 64, seed) for seed in range(3)]
    together = engine.answer(image_state(engine, "a red fox", *images))
    assert together.probs.shape == (3, 4, 9) and together.label_mass is not None
    for index, image in enumerate(images):
        alone = engine.answer(image_state(engine, "a red fox", image))
        assert alone.label_mass is not None
        np.testing.assert_allclose(together.probs[index], alone.probs[0], atol=1e-5)
        np.testing.assert_allclose(together.label_mass[index], alone.label_mass[0], atol=1e-6)
    assert np.ptp(together.probs, axis=0).max() > 0.01  # the images matter


def test_some_dimensions_answer_as_all_do(engine: Engine) -> None:
    state = image_state(engine, "a red fox", noise(64, 64))
    every = engine.answer(state).probs
    np.testing.assert_allclose(engine.answer(state, [2]).probs, every[:, [2]], atol=1e-6)
    np.testing.assert_allclose(engine.answer(state, [3, 0]).probs, every[:, [3, 0]], atol=1e-6)


@pytest.mark.parametrize("prompt", ["", "  \n", "x" * 5000, "an <|im_end|> example", "\ud800", None])
def test_prompts_that_are_refused(engine: Engine, prompt: str) -> None:
    with pytest.raises(PromptError):
        engine.prompt_state(prompt)


def test_the_thinnest_image_after_the_longest_prompt_has_positions(engine: Engine) -> None:
    """A 200:1 image is longer in tokens than the pixel budget's square has."""
    limit = engine.contract.max_prompt_tokens
    text = "Qz7" * limit
    longest = next(
        text[:n]
        for n in range(limit + 50, 0, -1)
        if len(engine.encoder._tokenizer.encode(text[:n], add_special_tokens=False).ids) <= limit
    )
    spec = engine.contract.image
    thin = noise(16, 3200)
    n_tokens = preprocess(thin, spec).n_tokens
    assert n_tokens > spec.max_pixels // spec.token_size**2
    answers = engine.answer(image_state(engine, longest, thin))
    assert np.isfinite(answers.probs).all()


@pytest.mark.parametrize("provider", ["gpu", "CPU", "", None])
def test_an_unknown_provider(tiny_bundle: Path, provider: str) -> None:
    with pytest.raises(UsageError, match=r"unknown provider.*auto, cpu"):
        Engine(Bundle.open(tiny_bundle), provider=provider)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_an_unusable_thread_count(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads must be a whole number"):
        Engine(Bundle.open(tiny_bundle), threads=threads)


def test_an_embedding_that_does_not_fit_the_tokenizer(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    info = bundle.manifest.embedding
    rows = 300  # the tokenizer has about 510 tokens
    file = bundle_copy / info.file
    file.write_bytes(file.read_bytes()[: rows * info.shape[1] * 4])
    smaller = EmbeddingInfo(info.file, info.dtype, (rows, info.shape[1]))
    accept_changes(bundle, embedding=smaller)
    with pytest.raises(BackendError, match="beyond the embedding's 300 rows"):
        Engine(Bundle.open(bundle_copy))


def test_an_embedding_of_another_size(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    file = bundle_copy / bundle.manifest.embedding.file
    file.write_bytes(file.read_bytes()[:-4])
    accept_changes(bundle)
    with pytest.raises(BackendError, match="does not fit the shape"):
        Engine(Bundle.open(bundle_copy))


def test_a_graph_that_the_backend_refuses(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / "vision.onnx").write_bytes(b"")
    accept_changes(bundle)
    with pytest.raises(BackendError, match=r"vision\.onnx: onnxruntime .* refuses this graph"):
        Engine(Bundle.open(bundle_copy))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_a_closed_scorer_leaves_no_file_open(tiny_bundle: Path) -> None:
    def mapped() -> int:
        gc.collect()
        links = [p.readlink() for p in Path("/proc/self/fd").iterdir() if p.is_symlink() and p.exists()]
        opened = sum(str(link).startswith(str(tiny_bundle)) for link in links)
        return opened + Path("/proc/self/maps").read_text().count(str(tiny_bundle))

    before = mapped()
    with Scorer.open(tiny_bundle) as scorer:
        scorer.score(prompt="a red fox", images=[noise(64, 64)])
        assert mapped() > before  # the embedding at least
    assert mapped() == before


def test_the_system_text_is_read_once_and_changes_nothing(engine: Engine, tiny_bundle: Path) -> None:
    fresh = Engine(Bundle.open(tiny_bundle), threads=1)
    runs: list[int] = []
    read = fresh.system_state
    fresh.system_state = lambda: runs.append(1) or read()  # type: ignore[method-assign, func-returns-value]
    features = fresh.encode_image(preprocess(noise(64, 64), fresh.contract.image))
    for prompt in ("a red fox", "7 cubes", "a red fox"):
        kept = fresh.prompt_state(prompt)
        given = fresh.prompt_state(prompt, engine.system_state())
        ids = engine.encoder.text_prefix_ids(prompt)
        whole = engine._read(DecoderState(engine._empty_states(), 0, 0), engine._embedding.rows(ids))
        assert kept.length == whole.length and kept.position == whole.position
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(kept.arrays[name], given.arrays[name])
            np.testing.assert_allclose(kept.arrays[name], array, atol=1e-5)
        expected = engine.answer(engine.image_state(whole, [features], (4, 4))).probs
        found = fresh.answer(fresh.image_state(kept, [features], (4, 4))).probs
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(runs) == 1


def test_a_prompt_that_merges_with_the_text_before_it_is_read_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.prompt_state("a red fox")
    other = engine.encoder.system_ids.copy()
    other[-1] += 1  # as if the text ended in another token than the prefix has there
    monkeypatch.setitem(engine.encoder.__dict__, "system_ids", other)
    found = engine.prompt_state("a red fox")
    assert (found.length, found.position) == (expected.length, expected.position)
    for name, array in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], array, atol=1e-5)
