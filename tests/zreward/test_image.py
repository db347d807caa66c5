"""zreward.image against transformers' Qwen2VLImageProcessorPil, on sizes, values and patch order."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from zreward.errors import ContractError, ImageError
from zreward.image import (
    ImageInput,
    ImageSpec,
    Patches,
    preprocess,
    resized_size,
)

SMALL = ImageSpec(min_pixels=64 * 64, max_pixels=160 * 160)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: both resampling and compression have something to do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def reference_patches(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, ...]]:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
    )
    result = processor(image, return_tensors="np")
    return np.asarray(result["pixel_values"]), tuple(result["image_grid_thw"][0].tolist())


def pixel_units(values: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Undo the normalization: [n, 3, …] in 0…1."""
    planes = values.astype(np.float64).reshape(len(values), 3, -1)
    return planes * np.array(spec.std)[:, None] + np.array(spec.mean)[:, None]


def test_patches_match_transformers_on_random_images() -> None:
    rng = np.random.default_rng(0)
    specs = (
        SMALL,
        replace(SMALL, mean=(0.481, 0.458, 0.408), std=(0.269, 0.261, 0.276)),
        ImageSpec(patch_size=12, merge_size=2, min_pixels=48 * 48, max_pixels=96 * 96),
        ImageSpec(patch_size=8, merge_size=1, temporal_patch_size=1, min_pixels=1024, max_pixels=9216),
        ImageSpec(patch_size=6, merge_size=3, temporal_patch_size=3, min_pixels=1024, max_pixels=9216),
    )
    worst = 0.0
    for trial in range(300):
        spec = specs[trial % len(specs)]
        height, width = (int(np.exp(rng.uniform(0, np.log(500)))) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            width = height
        # Modes that transformers converts to RGB without loss of meaning; the others have tests below.
        image = picture(height, width, trial).convert(("RGB", "L", "P", "CMYK", "YCbCr", "1")[trial % 6])
        patches = preprocess(image, spec)
        expected, grid = reference_patches(image, spec)
        assert patches.grid_thw == grid
        assert patches.pixel_values.shape == expected.shape
        assert patches.pixel_values.dtype == np.float32
        assert patches.n_tokens == len(expected) // spec.merge_size**2
        difference = pixel_units(patches.pixel_values, spec) - pixel_units(expected, spec)
        worst = max(worst, float(np.abs(difference).max()))
    assert worst <= 1e-6  # float32 rounding; 1 / 255 would be one grey level


def test_patches_are_contiguous_and_cover_the_whole_range() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    patches = preprocess(pixels, SMALL)
    assert isinstance(patches, Patches)
    assert patches.pixel_values.flags.c_contiguous
    assert patches.grid_thw == (1, 4, 4)
    assert patches.n_tokens == 4
    np.testing.assert_allclose(patches.pixel_values[:4], -1.0, atol=1e-6)  # first merge block: top left
    np.testing.assert_allclose(patches.pixel_values[4:8], 1.0, atol=1e-6)


def test_all_kinds_of_source_give_the_same_patches(tmp_path: Path) -> None:
    image = picture(50, 70)
    path = tmp_path / "a.png"
    image.save(path)
    expected = preprocess(image, SMALL).pixel_values
    sources: list[ImageInput] = [path, str(path), path.read_bytes(), np.asarray(image), Image.open(path)]
    for source in sources:
        np.testing.assert_array_equal(preprocess(source, SMALL).pixel_values, expected)


sides = st.integers(1, 6000)
specs_st = st.builds(
    lambda patch, merge, low, ratio: ImageSpec(
        patch, merge, 2, low * (patch * merge) ** 2, ratio * low * (patch * merge) ** 2
    ),
    st.integers(4, 20),
    st.integers(1, 3),
    st.integers(1, 64),
    st.integers(1, 64),
)


@given(sides, sides, specs_st)
@settings(max_examples=400)
def test_resized_size_is_smart_resize(height: int, width: int, spec: ImageSpec) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    bounds = {"min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    try:
        expected = module.smart_resize(height, width, factor=spec.token_size, **bounds)
    except ValueError:
        with pytest.raises(ImageError, match="aspect ratio above 200:1"):
            resized_size(height, width, spec)
    else:
        assert resized_size(height, width, spec) == expected


@given(sides, sides, specs_st)
@settings(max_examples=400)
def test_laws_of_resized_size(height: int, width: int, spec: ImageSpec) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    new_h, new_w = resized_size(height, width, spec)
    assert new_h % spec.token_size == new_w % spec.token_size == 0
    assert new_h >= spec.token_size and new_w >= spec.token_size
    assert resized_size(width, height, spec) == (new_w, new_h)
    # The budget holds wherever the grid has room for it: not for strips of one token, nor for bounds
    # closer together than the growth by up to one token a side.
    roomy = spec.max_pixels >= 4 * spec.min_pixels and min(new_h, new_w) > 2 * spec.token_size
    if roomy:
        assert new_h * new_w <= spec.max_pixels
    if spec.min_pixels <= new_h * new_w <= spec.max_pixels and max(new_h, new_w) <= 200 * min(new_h, new_w):
        assert resized_size(new_h, new_w, spec) == (new_h, new_w)


@pytest.mark.parametrize(("height", "width"), [(1, 201), (5000, 1), (10, 2001)])
def test_extreme_aspect_ratio_is_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match="aspect ratio above 200:1; crop or pad it"):
        preprocess(Image.new("RGB", (width, height)), SMALL)
    assert resized_size(1, 200, SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"patch_size": 16.0}, r"patch_size is 16\.0"),
        ({"merge_size": True}, "merge_size is True"),
        ({"temporal_patch_size": "2"}, "temporal_patch_size is '2'"),
        ({"min_pixels": -1}, "min_pixels is -1"),
        ({"max_pixels": 1000}, "exceeds max_pixels 1000"),
        ({"min_pixels": 1, "max_pixels": 1023}, "less than one token, 32² pixels"),
        ({"mean": (0.5, 0.5)}, "mean is .* expected three finite numbers"),
        ({"mean": "555"}, "mean is '555'"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean is"),
        ({"std": (0.5, 0.0, 0.5)}, "std is .* positive"),
        ({"std": 0.5}, r"std is 0\.5"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        ImageSpec(**fields)  # type: ignore[arg-type]


def test_spec_reads_json_lists_and_stays_hashable() -> None:
    spec = ImageSpec(**json.loads('{"mean": [0, 0, 0], "std": [1, 1, 1]}'))
    assert spec.mean == (0.0, 0.0, 0.0)
    assert hash(spec) == hash(ImageSpec(mean=(0, 0, 0), std=(1, 1, 1)))
    assert ImageSpec().token_size == 32


def test_import_needs_only_numpy_and_pillow() -> None:
    code = (
        "import sys, zreward.image, zreward.metrics; "
        "bad = {'torch', 'transformers', 'scipy', 'onnx'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
