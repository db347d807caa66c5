"""L2: the builder against the real bindings of two versions of TensorRT, over libraries that are stubs.

`make test` installs the bindings beside the packages of its environment; they are NVIDIA's, and not in the repository.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.tensorrt_api import compile_stubs
from zreward.engines import Profile
from zreward.export.tensorrt.job import EngineJob

VERSIONS = ("10.16.1.11", "11.4.0.106")
PROFILES = (Profile("few", {"rows": (1, 2, 4)}), Profile("many", {"rows": (4, 8, 64)}))

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="NVIDIA has these bindings for Linux on x86-64",
)

REFUSALS = {
    "a refused graph": "refuses it: no importer (operator Odd, node node 0); no importer (operator Odd",
    "a refused profile": "refuses the sizes of the profile 'few'",
    "a failed build": "cannot build it",
    "a foreign cache": "timings of another GPU or another TensorRT; name another --timing-cache",
    "a bad library": "no library of plugins that this TensorRT can load",
    "no plugin layer": "its plugins serve no operator of g.onnx",
    "the real constructor": "does not start",
}


@pytest.fixture(scope="module", params=VERSIONS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the builder did over the bindings of one version, by what the library was made to say."""
    version = request.param
    bindings = Path(sys.prefix) / f"tensorrt-{version}"
    assert bindings.is_dir(), (
        f"the bindings of TensorRT {version} are not installed; `make bindings` installs them"
    )
    folder = tmp_path_factory.mktemp("stubs")
    stubs = compile_stubs(folder / "libraries", version.split(".")[0])
    cache = folder / "timings"
    cache.write_bytes(b"earlier")
    plain = EngineJob("tensorrt", str(folder / "g.onnx"), str(folder / "plain.engine"), PROFILES)
    full = dataclasses.replace(
        plain,
        engine=str(folder / "full.engine"),
        plugins=str(folder / "plugins.so"),
        timing_cache=str(cache),
        optimization_level=2,
    )
    jobs = {"everything": full, "nothing": plain} | dict.fromkeys(REFUSALS, full)
    (folder / "jobs.json").write_text(
        json.dumps({what: dataclasses.asdict(job) for what, job in jobs.items()})
    )
    command = [
        sys.executable,
        "-m",
        "tests.export.tensorrt.api_child",
        str(bindings),
        str(folder / "jobs.json"),
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)
    assert child.returncode == 0, child.stderr
    return {"version": version, "folder": folder, **json.loads(child.stdout)}


def test_every_call_fits_the_bindings(outcomes: dict[str, Any]) -> None:
    version, inputs, n_plugins = outcomes["everything"]["facts"]
    assert version == outcomes["version"]
    assert inputs == {"x": ["rows", 8], "scale": [1]}
    assert n_plugins == 1
    assert (outcomes["folder"] / "full.engine").read_bytes() == b"an engine"
    assert (outcomes["folder"] / "timings").read_bytes() == b"timings"
    calls = outcomes["everything"]["calls"]
    assert calls.index("IPluginRegistry.load_library") < calls.index("OnnxParser.parse_from_file")
    assert calls.count("IBuilderConfig.add_optimization_profile") == 2
    assert calls.count("IOptimizationProfile.set_shape") == 2  # of the input that varies, in each profile
    assert "IBuilderConfig.clear_flag" in calls and "IBuilderConfig.set_flag" not in calls


def test_the_check_refuses_what_the_bindings_do_not_have(outcomes: dict[str, Any]) -> None:
    assert len(outcomes["refused misuse"]) == 7


def test_what_is_not_asked_for_is_not_called(outcomes: dict[str, Any]) -> None:
    calls = outcomes["nothing"]["calls"]
    assert not any("lugin" in call or "timing" in call or "level" in call for call in calls)
    assert (outcomes["folder"] / "plain.engine").is_file()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_an_error_that_says_which(outcomes: dict[str, Any], what: str) -> None:
    assert REFUSALS[what] in outcomes[what]["error"]
