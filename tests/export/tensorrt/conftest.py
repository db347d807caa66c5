"""A bundle for TensorRT that several test files build engines of."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.bundles import lowered_here
from tests.support.models import Shape, write_checkpoint
from zreward.export import ExportOptions, export_bundle


@pytest.fixture(scope="session")
def fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer of each kind for TensorRT, in fp16: builders take seconds for each."""
    folder = tmp_path_factory.mktemp("tensorrt")
    shape = Shape(layers=2, full_attention_interval=2, vision_depth=1)
    checkpoint = write_checkpoint(folder / "checkpoint", shape)
    options = ExportOptions(target="tensorrt", weights="fp16", parity=False)
    with lowered_here():
        return export_bundle(checkpoint, folder / "bundle", options).path


@pytest.fixture
def copy(fp16_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp16_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))
