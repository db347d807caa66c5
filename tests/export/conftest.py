"""Fixtures of the export tests: one tiny checkpoint, its graphs as mobius builds them, and its bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.models import write_checkpoint
from zreward.checkpoint import Checkpoint
from zreward.export import ExportOptions, export_bundle
from zreward.export.graph import Graphs, graphs_from_checkpoint


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 checkpoint. Shared: tests that change it take a `checkpoint_copy`."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def checkpoint_copy(checkpoint_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_path, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def built_graphs(checkpoint_path: Path) -> Graphs:
    """Both graphs as mobius builds them, no pass applied. Shared: passes take `graphs`."""
    return graphs_from_checkpoint(Checkpoint.open(checkpoint_path))


@pytest.fixture
def graphs(built_graphs: Graphs) -> Graphs:
    """A copy of the graphs for a pass to change."""
    return Graphs(vision=built_graphs.vision.clone(), decoder=built_graphs.decoder.clone())


@pytest.fixture(scope="session")
def bundle_path(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of the tiny checkpoint, compared with transformers. Shared: not to be changed."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(checkpoint_path, path, ExportOptions(parity=True))
    return path
