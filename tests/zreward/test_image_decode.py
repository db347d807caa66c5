"""zreward.image_decode: every mode and layout becomes upright RGB, and every bad input is refused."""

from __future__ import annotations

import gc
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageFile

from zreward.errors import ImageError
from zreward.image_decode import MAX_SOURCE_PIXELS, ImageInput, load_image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: both resampling and compression have something to do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def png(header: bytes, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from its IHDR content, filtered rows and extra chunks, for files that Pillow does not write."""
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def assert_grey(image: Image.Image, level: int) -> None:
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (level, level, level)


@pytest.mark.parametrize(
    ("mode", "colour", "level"),
    [
        ("1", 1, 255),
        ("L", 100, 100),
        ("RGB", (100, 100, 100), 100),
        ("RGBX", (100, 100, 100, 0), 100),
        ("YCbCr", (100, 128, 128), 100),
        ("HSV", (0, 0, 100), 100),
        ("CMYK", (0, 0, 0, 155), 100),
        ("LA", (100, 255), 100),
        ("LA", (100, 0), 255),
        ("RGBA", (100, 100, 100, 0), 255),
        ("RGBA", (0, 0, 0, 51), 204),
        ("RGBa", (0, 0, 0, 51), 204),
        ("La", (0, 51), 204),
        ("I;16", 100 * 257, 100),
        ("I", 100 * 257, 100),
        ("F", 100 / 255, 100),
    ],
)
def test_every_mode_becomes_rgb_on_white(
    mode: str, colour: int | float | tuple[int, ...], level: int
) -> None:
    assert_grey(load_image(Image.new(mode, (3, 2), colour)), level)


def test_lab_becomes_rgb() -> None:
    srgb, cie_lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(srgb, cie_lab, "RGB", "LAB")
    lab = ImageCms.applyTransform(picture(8, 8), transform)
    assert lab is not None
    assert np.abs(np.asarray(load_image(lab)).astype(int) - np.asarray(picture(8, 8))).mean() < 4


def test_palette_and_colour_key_transparency_is_composited_on_white() -> None:
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 10, 10, 200, 200, 200])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\xff"):
        image = load_image(encoded(palette, transparency=transparency))
        assert_grey(image, 255)
        assert image.getpixel((1, 0)) == (200, 200, 200)
    assert_grey(load_image(encoded(palette)), 10)
    assert_grey(load_image(encoded(palette, "GIF", transparency=0)), 255)
    assert_grey(load_image(palette.convert("PA")), 10)
    assert_grey(load_image(encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9))), 255)
    assert_grey(load_image(encoded(Image.new("L", (2, 2), 9), transparency=9)), 255)


def test_sixteen_bit_png() -> None:
    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    rows = b"\x00" + struct.pack(">HH", 100 * 257, 65535)
    image = load_image(png(header, rows))
    assert_grey(image, 100)
    assert image.getpixel((1, 0)) == (255, 255, 255)
    keyed = png(header, rows, (b"tRNS", struct.pack(">H", 100 * 257)))
    assert_grey(load_image(keyed), 255)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_through_tiff(mode: str) -> None:
    top = 1.0 if mode == "F" else 65535
    assert_grey(load_image(encoded(Image.new(mode, (2, 2), top), "TIFF")), 255)


@pytest.mark.parametrize(
    ("mode", "value"), [("I", 65536), ("I", -1), ("F", 1.01), ("F", -0.1), ("F", float("nan"))]
)
def test_deep_grey_outside_its_range_is_refused(mode: str, value: float) -> None:
    image = Image.new(mode, (3, 3), 0)
    image.putpixel((1, 1), value)
    with pytest.raises(ImageError, match=f"mode {mode} holds values .* expected 0 to"):
        load_image(image)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (50, 150)]
    for fmt in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if fmt == "WEBP" else {}
        assert_grey(
            load_image(encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)), 50
        )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, fmt: str) -> None:
    """Marked corner: EXIF 2.32 names where the stored image's first row and first column belong."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    upright = np.asarray(load_image(encoded(Image.fromarray(stored), fmt, exif=exif)))
    assert upright.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    corners = upright[[[0, 0], [-1, -1]], [[0, -1], [0, -1]], 0] > 128
    expected = np.zeros((2, 2), bool)
    expected[int(bottom), int(right)] = True
    np.testing.assert_array_equal(corners, expected)


def test_damaged_exif_does_not_hide_a_sound_image() -> None:
    damaged = encoded(picture(16, 16), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(damaged).size == (16, 16)


def test_pil_image_is_left_as_it_was(tmp_path: Path) -> None:
    image = picture(8, 8)
    before = image.tobytes()
    loaded = load_image(image)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == before


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_arrays_of_every_layout(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 77, np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255
    image = load_image(array)
    assert image.size == (6, 4)
    assert_grey(image, 77)
    assert_grey(load_image(array[::-1, ::2]), 77)  # strided views too


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"dtype float32: expected uint8 .* round and cast"),
        (np.full((4, 4, 3), np.nan), "expected uint8"),
        (np.zeros((4, 4, 3), np.int64), "expected uint8"),
        (np.zeros((4, 4, 3), bool), "expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\].*expected one image"),
        (np.zeros((3, 8, 8), np.uint8), r"looks channels-first: pass array.transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "expected one image"),
        (np.zeros(5, np.uint8), "expected one image"),
        (np.zeros((), np.uint8), "expected one image"),
        (np.zeros((0, 4, 3), np.uint8), "is 4×0 pixels"),
        (np.zeros((4, 0), np.uint8), "is 0×4 pixels"),
    ],
)
def test_malformed_arrays_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "note.txt"
    text.write_text("not an image")
    cases: list[tuple[ImageInput, str]] = [
        (tmp_path / "missing.png", "missing.png: no such file"),
        ("https://example.com/a.png", "URLs are not fetched"),
        (tmp_path, "not a regular file"),
        (empty, "empty.png: the file is empty"),
        (text, r"note.txt: not an image that can be read; expected one of PNG, JPEG"),
        ("a\0b.png", "image a"),
        ("x" * 5000, "x…: "),
    ]
    for source, message in cases:
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source)
        assert len(str(caught.value)) < 800


@pytest.mark.parametrize("source", [None, 3, [1, 2], bytearray(b"abc")])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=f"image is of type {type(source).__name__}; expected a path"):
        load_image(source)


def test_bad_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="nothing to decode"):
        load_image(b"")
    with pytest.raises(ImageError, match=r"image bytes \(length 9\): not an image"):
        load_image(b"<svg></sv")
    with pytest.raises(ImageError, match="not an image"):  # Pillow would hand it to Ghostscript
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_truncated_files_are_never_padded(fmt: str, options: dict[str, object]) -> None:
    whole = encoded(picture(150, 200), fmt, **options)
    pixels = np.asarray(load_image(whole))
    refused = 0
    cuts = np.linspace(1, len(whole) - 1, 60).astype(int)
    for cut in cuts:
        try:
            shown = np.asarray(load_image(whole[:cut]))
        except ImageError:
            refused += 1
        else:
            np.testing.assert_array_equal(shown, pixels)  # only the closing marker was missing
    assert refused >= len(cuts) - 2


def test_truncated_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "half.jpg"
    whole = encoded(picture(150, 200), "JPEG")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"half\.jpg: .*truncated.*replace it"):
        load_image(path)
    with pytest.raises(ImageError, match=r"PIL image of mode RGB: .*truncated"):
        load_image(Image.open(path))


def test_threads_decode_alike_and_leave_the_warning_filters() -> None:
    sources = [encoded(picture(40, 50, seed), "JPEG") for seed in range(8)]
    expected = [load_image(source).tobytes() for source in sources]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: load_image(sources[i % 8]).tobytes(), range(200)))
    assert results == [expected[i % 8] for i in range(200)]
    assert list(warnings.filters) == before


def test_padding_switched_on_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES is on"):
        load_image(encoded(picture(8, 8)))
    assert load_image(picture(8, 8)).size == (8, 8)


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (12_000, 12_000), (10_001, 10_000)])
@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_bombs_are_refused_by_their_header(
    width: int, height: int, pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were decoded"))
    bomb = png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=f"(?i)make it smaller|{MAX_SOURCE_PIXELS}"):
            load_image(bomb)


def test_files_are_closed_and_warnings_kept(tmp_path: Path) -> None:
    """No ResourceWarning from a forgotten handle, nor anything that Pillow says about damaged files."""
    paths = [tmp_path / "a.png", tmp_path / "b.gif", tmp_path / "c.tiff", tmp_path / "d.jpg"]
    for path in paths:
        picture(20, 20).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in paths[:3]:
            load_image(path)
        with pytest.raises(ImageError):
            load_image(paths[3])
        gc.collect()
    assert caught == []
    descriptors = Path("/proc/self/fd")
    if descriptors.is_dir():
        targets = [str(link.readlink()) for link in descriptors.iterdir() if link.is_symlink()]
        assert not any(str(tmp_path) in target for target in targets)
