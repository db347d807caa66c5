"""The folder that the images of a data set are written to, where the set holds them itself.

A file is written beside its final name and renamed, so that a stopped conversion leaves no half image, and a file that
is already there is kept if it is the same one and never replaced.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from zreward.training.convert.records import Row

_SUFFIXES = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"GIF8", ".gif"))
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class ImageFolder:
    """Writes images by name; the folder is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()

    def put_content(self, row: Row, field: str) -> Path:
        """Write the image of a field under the digest of its bytes, for sets that give it no name."""
        data = row.image_bytes(field)
        return self._put(row, field, hashlib.sha256(data).hexdigest()[:32], data)

    def put_named(self, row: Row, field: str, name: str) -> Path:
        """Write the image of a field under `name` and the ending of its format.

        Raises:
            UsageError: the name is no plain file name, the field is no image, or another image has the name.
        """
        if not _NAME.fullmatch(name):
            raise row.error(f"{name!r} cannot name an image file")
        return self._put(row, field, name, row.image_bytes(field))

    def _put(self, row: Row, field: str, stem: str, data: bytes) -> Path:
        path = self.folder / (stem + _suffix(row, field, data))
        if path.name in self._known:
            return path
        if not path.is_file():
            self._write(path, data)
        elif path.read_bytes() != data:
            raise row.error(f"{path} is there and is another image; name an empty folder with --images")
        self._known.add(path.name)
        return path

    def _write(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _suffix(row: Row, field: str, data: bytes) -> str:
    for start, suffix in _SUFFIXES:
        if data.startswith(start):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    raise row.error(f"{field!r} is neither JPEG, PNG, WebP nor GIF; it starts with {data[:8]!r}")
