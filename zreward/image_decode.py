"""From whatever the caller holds (path, bytes, PIL image, array) to one upright RGB image, or an error.

A reward model scores any pixels it is given, so a damaged or misread image would become a confident wrong
number. Everything here is strict for that reason: truncated files are refused rather than padded, headers
are checked before pixels are decoded, and value ranges are never guessed from the data. The price is that
a few files which viewers show anyway (half-downloaded JPEGs) must be repaired first. What stays unseen are
altered bytes inside a format without checksums: a JPEG, unlike a PNG, then decodes to other pixels. ICC
profiles are not applied, as in the Qwen processors. The result goes to ``zreward.image.preprocess``.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from zreward.errors import ImageError

ImageInput = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]

MAX_SOURCE_PIXELS = 100_000_000
"""Largest accepted source, in pixels: above every common camera, 300 MB once decoded to RGB."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# EXIF 2.32, section 4.6.4 A: what undoes each stored orientation. 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_warnings_lock = threading.Lock()


def load_image(source: ImageInput) -> Image.Image:
    """Decode ``source`` into a new upright image of mode RGB that holds no file handle.

    EXIF orientation is applied; transparency (alpha, palette or colour key) is composited on white; of an
    animation the first frame is taken (of an open PIL image: its current frame). Deep greyscale is scaled
    to 8 bits from a fixed range: 0…65535 for 16-bit and 32-bit integers, 0…1 for floats; values outside
    the range are an error, since any other range would be a guess.

    Args:
        source: A path; the bytes of a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF or JPEG 2000 file; a PIL
            image of any mode that converts to RGB (left open and unchanged); or a uint8 array of shape
            [height, width], [height, width, 1], [height, width, 3] RGB or [height, width, 4] RGBA.

    Raises:
        ImageError: The source is missing, empty, not an image, truncated, larger than
            ``MAX_SOURCE_PIXELS`` or of another type, dtype or shape.
    """
    if isinstance(source, np.ndarray):
        return _image_from_array(source)
    if isinstance(source, Image.Image):
        return _rgb_from_image(source, f"PIL image of mode {source.mode}")
    if isinstance(source, bytes):
        where = f"image bytes (length {len(source)})"
        if not source:
            raise ImageError(f"{where}: nothing to decode; pass the content of an image file")
        return _image_from_stream(io.BytesIO(source), where)
    if isinstance(source, (str, os.PathLike)):
        return _image_from_path(source)
    kind = type(source).__name__  # type: ignore[unreachable]  # reached by untyped callers
    raise ImageError(f"image is of type {kind}; expected a path, bytes, a PIL image or a uint8 array")


def check_header(path: Path) -> None:
    """Refuse a file that is missing, no image, or too large, by its header alone: a millisecond, not a decoding.

    Raises:
        ImageError: what `load_image` would say of the header. Pixels may still turn out to be damaged.
    """
    where = f"image {path}"
    try:
        if not path.is_file():
            raise ImageError(f"{where}: no such file; check the path (URLs are not fetched)")
        with path.open("rb") as stream, _opened(stream, where) as image:
            _check_size(*image.size, where)
    except OSError as error:
        raise ImageError(f"{where}: cannot be read: {error.strerror}") from error


def _image_from_path(source: str | os.PathLike[str]) -> Image.Image:
    text = os.fsdecode(source)
    # Base64 or file content handed over as a path would otherwise fill the screen.
    where = f"image {text if len(text) <= 200 else text[:200] + '…'}"
    path = Path(text)
    try:
        if not path.exists():
            raise ImageError(f"{where}: no such file; check the path (URLs are not fetched)")
        if not path.is_file():
            raise ImageError(f"{where}: not a regular file; pass the path of one image")
        if path.stat().st_size == 0:
            raise ImageError(f"{where}: the file is empty; write or download it again")
        with path.open("rb") as stream:
            return _image_from_stream(stream, where)
    except OSError as error:  # no permission, name too long, …; str(error) would repeat the whole name
        raise ImageError(f"{where}: cannot be read: {error.strerror}") from error


def _image_from_stream(stream: IO[bytes], where: str) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ImageError(
            f"{where}: not decoded, because PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process and a "
            "damaged file would be padded and scored; set it to False or pass decoded PIL images"
        )
    with _opened(stream, where) as image:
        return _rgb_from_image(image, where)


def _opened(stream: IO[bytes], where: str) -> Image.Image:
    """The image with its header read and its pixels not yet decoded."""
    try:
        with _quiet_pillow():
            return Image.open(stream, formats=_readable_formats())
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{where}: not an image that can be read; expected one of {', '.join(_readable_formats())}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{where}: {error} Make it smaller, at most {MAX_SOURCE_PIXELS} pixels") from error
    except Exception as error:  # plugins raise OSError, ValueError, EOFError, KeyError, … on damaged headers
        raise ImageError(f"{where}: damaged header ({_reason(error)}); replace the file") from error


def _image_from_array(array: NDArray[Any]) -> Image.Image:
    where = f"image array of shape {list(array.shape)} and dtype {array.dtype}"
    if array.dtype != np.uint8:
        raise ImageError(
            f"{where}: expected uint8 values 0…255; scale, round and cast it first, e.g. "
            "(255 * x).round().astype(numpy.uint8) for finite values in 0…1"
        )
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if not grey and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "; it looks channels-first: pass array.transpose(1, 2, 0)" if channels_first else ""
        raise ImageError(f"{where}: expected one image [height, width] or [height, width, 1, 3 or 4]{hint}")
    _check_size(array.shape[1], array.shape[0], where)
    pixels = np.ascontiguousarray(array.reshape(array.shape[:2]) if grey else array)
    return _rgb_from_image(Image.fromarray(pixels), where)


def _rgb_from_image(image: Image.Image, where: str) -> Image.Image:
    _check_size(*image.size, where)
    try:
        image.load()
        image = _upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _rgb_from_deep_grey(image, where)
        if image.mode == "La":  # Pillow would drop this alpha on the way to RGBA
            image = image.convert("LA")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, …
        raise ImageError(
            f"{where}: the {image.mode} pixels cannot be decoded ({_reason(error)}); the file is truncated, "
            "damaged or of an unsupported kind: replace it, or convert it to an RGB PNG"
        ) from error


def _rgb_from_deep_grey(image: Image.Image, where: str) -> Image.Image:
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # written so that NaN fails too
        raise ImageError(
            f"{where}: mode {image.mode} holds values {low:g} to {high:g}, expected 0 to {top:g}; "
            "rescale it, or convert it to 8 bits"
        )
    grey = np.rint(values * np.float32(255.0 / top)).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):  # a PNG's one transparent grey level
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        with _quiet_pillow():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata beside sound pixels: show them as stored, as viewers do
        return image
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _check_size(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{where}: is {width}×{height} pixels; expected at least one pixel")
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{where}: is {width}×{height} pixels, above the limit of {MAX_SOURCE_PIXELS}; make it smaller"
        )


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings about odd metadata from the caller; what matters is raised as an error.

    ``catch_warnings`` swaps process-wide state, so two threads inside it could restore the wrong filters.
    Only header and EXIF parsing warn; the lock leaves the slow part, pixel decoding, concurrent.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """The listed formats that this Pillow was built with; never EPS, which would run Ghostscript."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
