"""A JSONL job of a thousand lines, ten of them broken in the ten ways that people meet."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

N_LINES = 1000

EXPECTED_ERRORS = {
    50: "ImageError",  # missing file
    151: "ImageError",  # truncated JPEG
    252: "ImageError",  # zero bytes
    353: "ImageError",  # not an image
    454: "ImageError",  # 1 × 5000 pixels
    555: "ImageError",  # a header of 30,000 × 30,000 pixels
    656: "PromptError",  # empty prompt
    757: "LineError",  # unknown key
    858: "LineError",  # bad JSON
    959: "LineError",  # NaN
}
"""Line number, from 1, and the type of the error that answers it."""


def write_job(folder: Path) -> Path:
    """Write images and `pairs.jsonl` into `folder`; image paths are relative to it."""
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 256, (40 + 4 * number, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    _write_broken_images(folder)
    lines = [
        json.dumps({"prompt": f"scene {n // 20}", "image": f"{n % 20}.png", "id": f"item-{n}"})
        for n in range(1, N_LINES + 1)
    ]
    for number, line in zip(EXPECTED_ERRORS, _broken_lines(), strict=True):
        lines[number - 1] = line
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _broken_lines() -> list[str]:
    images = ["missing.png", "truncated.jpg", "empty.png", "notes.png", "thin.png", "huge.png"]
    return [
        *(json.dumps({"prompt": "a scene", "image": name}) for name in images),
        json.dumps({"prompt": "  ", "image": "1.png"}),
        json.dumps({"prompt": "a scene", "image": "1.png", "promt": "a scene"}),
        '{"prompt": "a scene", "image": "1.png"',
        '{"prompt": "a scene", "image": "1.png", "id": NaN}',
    ]


def _write_broken_images(folder: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.png").write_text("This is not an image.\n" * 10, encoding="utf-8")
    Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    (folder / "huge.png").write_bytes(_png_header(30_000, 30_000))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and has next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0"))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
