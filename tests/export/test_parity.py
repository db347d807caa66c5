"""Parity of fp32 bundles: against transformers' full passes, shared prefix against four passes, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.models import Shape, write_checkpoint
from zreward.bundle import Bundle
from zreward.export import ExportOptions, export_bundle
from zreward.image import preprocess
from zreward.prompt import image_positions, text_positions
from zreward.reference import ReferenceModel
from zreward.runtime import Scorer
from zreward.runtime.engine import Engine

SHAPES = {
    "ordinary": Shape(),
    "one key head, odd head dims, untied": Shape(heads=(8, 1), head_dim=48, tied=False, patch=12),
    "many heads, deep, alternating": Shape(
        hidden=96, layers=6, full_attention_interval=2, heads=(6, 6), head_dim=64, partial_rotary=0.5
    ),
    "wide linear values": Shape(linear_heads=(1, 8), linear_dims=(32, 64), vision_depth=3, patch=16),
    "large head, shallow, untied": Shape(
        layers=2, full_attention_interval=2, heads=(8, 2), head_dim=256, tied=False, patch=14, vision_heads=2
    ),
    "fine position grid": Shape(hidden=128, vision_hidden=64, position_grid=24, linear_dims=(128, 32)),
}
# height and width in units of one token (patch × merge)
IMAGES = {"square": (5, 5), "wide": (2, 12), "tall": (11, 3), "smallest": (2, 2), "over budget": (20, 15)}
PROMPT = "a red fox jumps over 2 lazy dogs, oil on canvas — détail"


@pytest.fixture(scope="module", params=["reference student", *SHAPES])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_student: Path
) -> tuple[Path, Path]:
    """The reference student, or a random checkpoint of one shape, and its fp32 bundle."""
    path = tmp_path_factory.mktemp("parity")
    checkpoint = reference_student
    if request.param in SHAPES:
        index = list(SHAPES).index(request.param)
        checkpoint = write_checkpoint(path / "checkpoint", SHAPES[request.param], seed=index)
    export_bundle(checkpoint, path / "bundle", ExportOptions(parity=False))
    return checkpoint, path / "bundle"


def pictures(bundle: Bundle) -> dict[str, Image.Image]:
    """One picture of noise per image shape."""
    rng = np.random.default_rng(0)
    side = bundle.contract.image.patch_size * bundle.contract.image.merge_size
    return {
        name: Image.fromarray(rng.integers(0, 256, (height * side, width * side, 3), dtype=np.uint8))
        for name, (height, width) in IMAGES.items()
    }


def scored(scorer: Scorer, images: list[Image.Image]) -> NDArray[np.float64]:
    scores = scorer.score(prompt=PROMPT, images=images)
    return np.array([[score[name].probs for name in score] for score in scores])


@pytest.mark.slow
def test_bundle_equals_transformers(model: tuple[Path, Path]) -> None:
    checkpoint, bundle = model
    with Scorer.open(bundle) as scorer, ReferenceModel(checkpoint) as reference:
        for name, picture in pictures(scorer.bundle).items():
            expected = reference.probabilities(PROMPT, picture)
            difference = np.abs(scored(scorer, [picture])[0] - expected).max()
            assert difference <= 5e-5, name
            # answers that all look alike would hide an error
            assert np.ptp(expected, axis=1).max() > 0.02, name


@pytest.mark.slow
def test_shared_prefix_equals_full_passes_in_the_same_engine(model: tuple[Path, Path]) -> None:
    bundle = Bundle.open(model[1])
    engine = Engine(bundle)
    with Scorer(engine) as scorer:
        for name, picture in pictures(bundle).items():
            shared = scored(scorer, [picture])[0]
            full = np.stack([full_pass(engine, picture, d) for d in range(len(bundle.contract.dimensions))])
            assert np.abs(shared - full).max() <= 1e-5, name


@pytest.mark.slow
def test_batch_equals_single(model: tuple[Path, Path]) -> None:
    with Scorer.open(model[1]) as scorer:
        images = list(pictures(scorer.bundle).values())
        images += [picture.rotate(180) for picture in images]
        together = scored(scorer, images)
        alone = np.concatenate([scored(scorer, [image]) for image in images])
        assert np.abs(together - alone).max() <= 1e-5


def full_pass(engine: Engine, picture: Image.Image, dimension: int) -> NDArray[np.float64]:
    """One dimension by one run of the decoder over the whole sequence, without any shared state."""
    contract = engine.contract
    patches = preprocess(picture, contract.image)
    features = engine.encode_image(patches)
    text = engine.encoder.text_prefix_ids(PROMPT)
    question = engine.encoder.question_ids[dimension]
    image, after = image_positions(len(text), *patches.token_grid)
    positions = np.concatenate(
        [text_positions(0, len(text)), image, text_positions(after, 1 + len(question))], axis=1
    )
    tail = np.concatenate([engine.encoder.image_span_ids(0), question])
    embeddings = np.concatenate([engine._embedding.rows(text), features, engine._embedding.rows(tail)])
    inputs = {
        "inputs_embeds": embeddings[None],
        "attention_mask": np.ones((1, len(embeddings)), dtype=np.int64),
        "position_ids": positions[:, None],
        "last_index": np.array([len(embeddings) - 1]),
        "temperature": np.array([contract.temperatures[dimension]], dtype=np.float32),
        "keep_states": np.array(0),
        **engine._empty_states(),
    }
    probs: NDArray[np.float64] = engine._graphs["decoder"].run(["probs"], inputs)[0][0].astype(np.float64)
    return probs
