"""Bundles made quickly, and bundles altered on purpose, with a manifest that says that nothing happened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zreward.bundle import Bundle, file_entries, write_manifest


@contextmanager
def lowered_here() -> Iterator[None]:
    """Exports lower in this process: for a tiny model, a child spends most of its time on importing torch again."""
    from zreward.export.lowering import lower_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zreward.export.build.lower_in_child", lower_checkpoint)
        yield


def accept_changes(bundle: Bundle, **changes: Any) -> None:
    """Write the manifest again with the sizes and hashes that the files have now, and with `changes`."""
    files = file_entries(bundle.path)
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, files=files, **changes))


def scramble(file: Path) -> None:
    """Shuffle the values of a weight file: of the same scale, and wrong."""
    values = np.fromfile(file, dtype=np.float32)
    np.random.default_rng(0).shuffle(values)
    values.tofile(file)


def change_golden(bundle: Bundle, amount: float) -> None:
    """Move `amount` of probability between two bins of the last golden item."""
    path = bundle.path / bundle.manifest.golden.file
    data = json.loads(path.read_text())
    probs = data["items"][-1]["probs"][bundle.contract.dimension_names[-1]]
    high = int(np.argmax(probs))
    probs[high] -= amount
    probs[high - 1] += amount
    path.write_text(json.dumps(data))
