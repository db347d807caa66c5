"""L2: the TensorRT backend on the reference student, over the real bindings of TensorRT and cuda-bindings.

Libraries are stubs, the GPU is the host's memory, and ONNX Runtime computes what an engine would; `backend_child` has
the scenarios.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtime.tensorrt import backend_child as child
from tests.runtime.tensorrt import conforming, failing, running
from tests.support.bundles import accept_changes
from tests.support.cuda_driver import compile_driver
from tests.support.tensorrt_api import VERSIONS, bindings_environment, on_linux_x86_64
from zreward import cuda_device
from zreward.bundle import Bundle
from zreward.errors import BackendError
from zreward.export import ExportOptions, export_bundle
from zreward.runtime import Scorer

pytestmark = on_linux_x86_64

OF_RTX = [conforming.conformance_of_a_flavour_without_plugins.__name__]
ALL = [scenario.__name__ for scenario in child.SCENARIOS if scenario.__name__ not in OF_RTX]
WHERE_INTERFACES_DIFFER = [
    running.scores_equal_those_of_the_cpu.__name__,
    running.every_call_of_a_run.__name__,
    running.graphs_are_captured_replayed_and_bounded.__name__,
    failing.plugins_are_hashed_before_they_are_loaded.__name__,
]
RTX = "tensorrt-rtx"
SCENARIOS = {
    VERSIONS[0]: ALL,
    VERSIONS[1]: [
        *WHERE_INTERFACES_DIFFER,
        conforming.conformance_of_plugins_that_are_not_there.__name__,
    ],
    RTX: [*WHERE_INTERFACES_DIFFER[:-1], *OF_RTX],
}

Outcomes = dict[str, str | None]
Run = Callable[[str, Sequence[str]], Outcomes]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, reference_student: Path) -> Path:
    """The reference student for TensorRT, in float32, so that scores can be compared bit for bit."""
    options = ExportOptions(target="tensorrt", weights="fp32", parity=False)
    return export_bundle(reference_student, tmp_path_factory.mktemp("tensorrt") / "bundle", options).path


@pytest.fixture(scope="module")
def run(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs scenarios over the bindings of one version, in a process that finds the stubs."""

    def run_child(version: str, scenarios: Sequence[str]) -> Outcomes:
        stubs = tmp_path_factory.mktemp("stubs")
        compile_driver(stubs)
        if version == RTX:
            flavour, environment = RTX, {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
        else:
            flavour, environment = "tensorrt", bindings_environment(version, stubs)
        command = [sys.executable, "-m", child.__name__, flavour, str(student), *scenarios]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=450)
        assert done.returncode == 0, done.stderr
        outcomes: Outcomes = json.loads(done.stdout)
        return outcomes

    return run_child


@pytest.fixture(scope="module")
def outcomes(run: Run) -> Callable[[str], Outcomes]:
    """What became of the scenarios over the bindings of one version, which run once."""
    known: dict[str, Outcomes] = {}

    def outcomes_of(version: str) -> Outcomes:
        if version not in known:
            known[version] = run(version, SCENARIOS[version])
        return known[version]

    return outcomes_of


@pytest.mark.parametrize(
    ("version", "scenario"), [(version, name) for version, names in SCENARIOS.items() for name in names]
)
def test_the_backend(outcomes: Callable[[str], Outcomes], version: str, scenario: str) -> None:
    failure = outcomes(version)[scenario]
    assert failure is None, failure


def test_a_driver_that_lacks_a_function(run: Run) -> None:
    (outcome,) = run(VERSIONS[1], [child.ALONE.__name__]).values()
    assert outcome is None, outcome


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_no_driver(student: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setattr(cuda_device, "_LIBRARY", "libcuda-of-no-machine.so.1")
    with pytest.raises(BackendError, match=r"no CUDA driver on this machine .*install NVIDIA's driver"):
        Scorer.open(student, provider=provider)


def test_a_bundle_of_another_target(student: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(student, tmp_path / "bundle"))
    accept_changes(Bundle.open(copy), target="cpu")
    with pytest.raises(BackendError, match=r"exported for cpu, .* tensorrt cannot run; .*--target tensorrt"):
        Scorer.open(copy, provider="tensorrt")


@pytest.mark.parametrize("missing", ["tensorrt", "cuda-bindings"])
def test_packages_that_are_not_installed(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    monkeypatch.setattr("zreward.runtime.backends.tensorrt.opening.compute_capability", lambda device: "8.9")
    if missing == "tensorrt":
        with pytest.raises(
            BackendError, match=r"TensorRT cannot be imported .*pip install 'zreward\[tensorrt\]'"
        ):
            Scorer.open(student, provider="tensorrt")
        return
    from tests.support.tensorrt_engines import write_engine
    from zreward.tensorrt_library import load_tensorrt

    copy = Path(shutil.copytree(student, tmp_path / "bundle"))
    write_engine(Bundle.open(copy), "tensorrt-rtx", str(load_tensorrt("tensorrt-rtx").__version__))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        BackendError, match=r"cuda-bindings cannot be imported .*pip install 'zreward\[tensorrt\]'"
    ):
        Scorer.open(copy, provider="tensorrt-rtx")
