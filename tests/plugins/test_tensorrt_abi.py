"""The declarations that the plugins are built on in tests, against NVIDIA's: their headers, and a real plugin registry.

Where ZREWARD_TENSORRT_INCLUDE names a folder of TensorRT's headers, layouts are compared; TensorRT-RTX's registry loads
the library. docs/plugins.md names the versions for which both were run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugins import EMULATOR, ROOT, STAND_IN, run
from tests.support.tensorrt_api import on_linux_x86_64
from zreward.plugins import OPERATORS, described

needs_headers = pytest.mark.skipif(
    "ZREWARD_TENSORRT_INCLUDE" not in os.environ,
    reason="ZREWARD_TENSORRT_INCLUDE names no headers of TensorRT",
)

LOGGERS = ("ILogger::", "ILoggerFinder::")
"""What TensorRT 11 lays out in another way than TensorRT 10; so a library serves one of them."""


def layout(headers: Path, folder: Path) -> list[str]:
    program = folder / "layout"
    flags = ["-std=c++17", "-Wno-deprecated-declarations", "-Wno-invalid-offsetof"]
    source = ROOT / "plugins" / "tensorrt_abi" / "layout.cpp"
    run(["g++", *flags, "-isystem", str(headers), f"-I{EMULATOR}", str(source), "-o", str(program)])
    return run([str(program)]).splitlines()


@needs_headers
def test_the_layout_is_that_of_the_headers(tmp_path: Path, emulated: Path) -> None:
    ours = layout(STAND_IN, tmp_path)
    theirs = layout(Path(os.environ["ZREWARD_TENSORRT_INCLUDE"]), tmp_path)
    major = int(
        described(emulated / "libplugins.so")["tensorrt"].split(".")[0]
    )  # which is built on their headers
    differing = [line for line in set(ours) ^ set(theirs) if major == 11 or not line.startswith(LOGGERS)]
    assert len(ours) == len(theirs) > 50
    assert not differing


IN_RTX = """
import json, sys
import numpy as np
import tensorrt_rtx_bindings as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
types = trt.PluginFieldType
given = {"key_heads": (2, types.INT32), "value_heads": (4, types.INT32), "scale": (0.125, types.FLOAT32),
         "key_epsilon": (1e-6, types.FLOAT32)}
numpy_types = {types.INT32: np.int32, types.FLOAT32: np.float32}
arrays = {name: np.array([value], numpy_types[kind]) for name, (value, kind) in given.items()}
fields = [trt.PluginField(name, arrays[name], kind) for name, (_, kind) in given.items()]
creators = {name: registry.get_creator(name, "1", "zreward") for name in json.loads(sys.argv[2])}
rule = creators["GatedDeltaRule"]
print(json.dumps({
    "creators": {name: creator is not None and [creator.name, creator.plugin_version, creator.plugin_namespace]
                 for name, creator in creators.items()},
    "made": rule.create_plugin("rule", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD) is not None,
    "refused": rule.create_plugin("rule", trt.PluginFieldCollection(fields[:2]), trt.TensorRTPhase.BUILD) is None,
    "errors": logger.errors,
    "networks_take_plugins": hasattr(trt.INetworkDefinition, "add_plugin_v3"),
}))
"""


@on_linux_x86_64
def test_a_real_registry_takes_the_library(emulated: Path) -> None:
    """Creators, a plugin of good attributes, none of bad ones, and the reason in the real logger.

    It is a process of its own: a call through a wrong layout would end it.
    """
    command = [sys.executable, "-c", IN_RTX, str(emulated / "libplugins.so"), json.dumps(OPERATORS)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["creators"] == {name: [name, "1", "zreward"] for name in OPERATORS}
    assert found["made"] and found["refused"]
    assert "GatedDeltaRule: attribute scale is missing" in found["errors"]
    assert not found["networks_take_plugins"], (
        "PluginLibrary.load refuses it for this; look whether it still must"
    )
