"""Fixtures of the runtime tests: the bundle of one tiny checkpoint, and scorers that share it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_checkpoint
from zreward.export import ExportOptions, export_bundle
from zreward.runtime import Scorer


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with label mass. Shared: tests that change it take a `bundle_copy`."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = write_checkpoint(folder / "checkpoint")
    export_bundle(checkpoint, folder / "bundle", ExportOptions(label_mass=True, parity=False))
    return folder / "bundle"


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def scorer(tiny_bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(tiny_bundle, threads=1) as opened:
        yield opened
