"""L2: the builder against the real bindings of two versions of TensorRT, over libraries that are stubs."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.plugins import recorded_library
from tests.support.tensorrt_api import VERSIONS, bindings_environment, on_linux_x86_64
from zreward.engines import Profile
from zreward.export.tensorrt.job import EngineJob, PluginsOfJob

PROFILES = (Profile("few", {"rows": (1, 2, 4)}), Profile("many", {"rows": (4, 8, 64)}))

pytestmark = on_linux_x86_64

REFUSALS = {
    "a refused graph": r"refuses it: no importer \(operator Odd, node node 0\); no importer \(operator Odd",
    "a refused profile": "refuses the sizes of the profile 'few'",
    "a failed build": "cannot build it",
    "a foreign cache": "timings: not timings of this GPU and this TensorRT; name another --timing-cache",
    "a damaged cache": "timings: not timings of this GPU and this TensorRT",
    "a library that does not load": "PluginError: .*plugins.so: TensorRT .* does not take this library",
    "a library without plugins": "does not take this library .no plugin for RubricExpectation, CausalConv1d, Gated",
    "a library of another version": "PluginError: .*built for TensorRT 9.0.0, but TensorRT 1.* is installed",
    "a library that was altered": "PluginError: .*altered after it was built",
    "no plugin layer": "plugins.so: no operator of g.onnx became a plugin",
    "the real constructor": "does not start",
}


def plugins_for(version: str, library: Path) -> PluginsOfJob:
    return PluginsOfJob(str(library), recorded_library(library, version).sha256)


@pytest.fixture(scope="module", params=VERSIONS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the builder did over the bindings of one version, by what the library was made to say."""
    version = request.param
    folder = tmp_path_factory.mktemp("stubs")
    environment = bindings_environment(version, folder)
    cache = folder / "timings"
    cache.write_bytes(b"earlier")
    plain = EngineJob("tensorrt", str(folder / "g.onnx"), str(folder / "plain.engine"), PROFILES)
    full = dataclasses.replace(
        plain,
        engine=str(folder / "full.engine"),
        plugins=plugins_for(version, folder / "plugins.so"),
        timing_cache=str(cache),
        optimization_level=2,
    )
    quick_head = dataclasses.replace(plain, quick_head=True)
    jobs = {"everything": full, "nothing": plain, "quick head": quick_head} | dict.fromkeys(REFUSALS, full)
    other = plugins_for("9.0.0", folder / "other_plugins.so")
    jobs["a library of another version"] = dataclasses.replace(full, plugins=other)
    altered = plugins_for(version, folder / "altered_plugins.so")
    Path(altered.path).write_bytes(b"something else")
    jobs["a library that was altered"] = dataclasses.replace(full, plugins=altered)
    (folder / "jobs.json").write_text(
        json.dumps({what: dataclasses.asdict(job) for what, job in jobs.items()})
    )
    command = [sys.executable, "-m", "tests.export.tensorrt.api_child", str(folder / "jobs.json")]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)
    assert child.returncode == 0, child.stderr
    return {"version": version, "folder": folder, **json.loads(child.stdout.splitlines()[-1])}


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


def test_the_head_alone_is_registered_before_the_graph_is_read(outcomes: dict[str, Any]) -> None:
    calls = outcomes["quick head"]["calls"]
    registered = calls.index("register_creator zreward::RubricExpectation")
    assert registered < calls.index("OnnxParser.parse_from_file")
    assert outcomes["quick head"]["facts"][2] == 1
    assert "IPluginRegistry.load_library" not in calls


def test_the_check_refuses_what_the_bindings_do_not_have(outcomes: dict[str, Any]) -> None:
    assert len(outcomes["refused misuse"]) == 7


def test_what_is_not_asked_for_is_not_called(outcomes: dict[str, Any]) -> None:
    calls = outcomes["nothing"]["calls"]
    assert not any("lugin" in call or "timing" in call or "level" in call for call in calls)
    assert (outcomes["folder"] / "plain.engine").is_file()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_an_error_that_says_which(outcomes: dict[str, Any], what: str) -> None:
    assert re.search(REFUSALS[what], outcomes[what]["error"], re.DOTALL)
