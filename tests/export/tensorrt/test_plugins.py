"""Which plugins an engine is built with, and what its record says of them; a stand-in for the builder notes jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.plugins import recorded_library
from zreward.bundle import Bundle
from zreward.commands.engine import FlavourName
from zreward.commands.engine import engine as engine_command
from zreward.engines import select_engine
from zreward.errors import PluginError, UsageError
from zreward.export.tensorrt import EngineOptions, build_engine
from zreward.export.tensorrt.job import EngineFacts, EngineJob, PluginsOfJob
from zreward.progress import Progress


@pytest.fixture
def tensorrt_here(monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
    """A machine with a GPU, and a builder that notes its jobs."""
    jobs: list[EngineJob] = []

    def build(job: EngineJob, report: Progress) -> EngineFacts:
        Path(job.engine).write_bytes(b"an engine")
        jobs.append(job)
        n_plugins = 1 if job.quick_head else 3 if job.plugins else 0
        inputs = {axis: (axis,) for axis in job.profiles[0].axes}
        return EngineFacts("11.4.0", inputs, n_plugins)

    monkeypatch.setattr("zreward.export.tensorrt.build.compute_capability", lambda: "8.9")
    monkeypatch.setattr("zreward.export.tensorrt.build.build_in_child", build)
    monkeypatch.delenv("ZREWARD_PLUGINS", raising=False)
    return jobs


def test_the_record_names_the_plugins(copy: Path, tensorrt_here: list[EngineJob], tmp_path: Path) -> None:
    library = tmp_path / "libzreward_plugins.so"
    record = recorded_library(library, "11.4.0")
    built = build_engine(copy, EngineOptions(plugins=library))
    assert built.path.name == "tensorrt-sm89-plugins"
    assert built.info.plugins == {library.name: record.sha256}
    assert [job.plugins for job in tensorrt_here] == [None, PluginsOfJob(str(library), record.sha256)]
    found = {"flavour": "tensorrt", "tensorrt_version": "11.4.0", "compute_capability": "8.9"}
    assert select_engine(Bundle.open(copy), **found, plugins=library) == built


def test_an_engine_with_the_head_compiled_in_needs_no_library(
    copy: Path, tensorrt_here: list[EngineJob]
) -> None:
    built = build_engine(copy, EngineOptions(quick_head=True))
    assert [job.quick_head for job in tensorrt_here] == [False, True]
    assert built.path.name == "tensorrt-sm89" and not built.info.plugins
    assert built.info.graphs["decoder"].plugin_layers == 1
    built.check_plugins(None)


@pytest.mark.parametrize(
    ("version", "content", "message"),
    [
        ("10.16.1", None, r"built for TensorRT 10.16.1, but TensorRT 11.4.0 is installed"),
        ("11.4.0", b"other", "was altered after it was built"),
    ],
)
def test_plugins_that_do_not_fit_are_refused_before_anything_is_built(
    copy: Path,
    tensorrt_here: list[EngineJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    content: bytes | None,
    message: str,
) -> None:
    library = tmp_path / "libzreward_plugins.so"
    recorded_library(library, version)
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr("zreward.export.tensorrt.build.installed_tensorrt", lambda: "11.4.0")
    with pytest.raises(PluginError, match=message):
        build_engine(copy, EngineOptions(plugins=library))
    assert not tensorrt_here and not (copy / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "takes_the_one_found"),
    [
        ({}, True),
        ({"no_plugins": True}, False),
        ({"quick_head": True}, False),
        ({"flavour": FlavourName.TENSORRT_RTX}, False),
    ],
)
def test_the_library_that_the_runtime_will_find_is_the_default(
    copy: Path,
    tensorrt_here: list[EngineJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, Any],
    takes_the_one_found: bool,
) -> None:
    library = tmp_path / "libzreward_plugins.so"
    recorded_library(library, "11.4.0")
    monkeypatch.setenv("ZREWARD_PLUGINS", str(library))
    engine_command(copy, **arguments)
    printed = capsys.readouterr()
    assert (f"with the plugins of {library}; --no-plugins" in printed.err) == takes_the_one_found
    assert ("3 plugin layers" in printed.out) == takes_the_one_found


@pytest.mark.parametrize("without", ["no_plugins", "quick_head"])
def test_a_library_cannot_be_named_and_left_out(copy: Path, without: str) -> None:
    with pytest.raises(UsageError, match="leave one of them out"):
        engine_command(copy, plugins=copy, **{without: True})
