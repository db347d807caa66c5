"""Runs the builder over the real bindings of one version, in a process whose loader finds the stub libraries.

python -m tests.export.tensorrt.api_child JOBS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt

from tests.support.tensorrt_api import CheckedModule
from zreward.errors import ExportError, ZrewardError
from zreward.export.tensorrt.builder import build
from zreward.export.tensorrt.job import EngineJob
from zreward.jsonfile import dataclass_from_json

INPUTS: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("x", (-1, 8), ("rows", "")),
    ("scale", (1,), ("",)),
)


def answers(trt: Any, what: str) -> dict[str, Any]:
    """What the objects of a library say that has a network of two inputs and three layers, one of them a plugin."""
    plugin, plain = trt.LayerType.PLUGIN_V3, trt.LayerType.CAST
    return {
        "INetworkDefinition.num_inputs": 2,
        "INetworkDefinition.num_layers": 3,
        "ITensor.name": lambda number: INPUTS[number][0],
        "ITensor.shape": lambda number: INPUTS[number][1],
        "ITensor.get_dimension_name": lambda number, axis: INPUTS[number][2][axis],
        "ILayer.type": lambda number: plain if number or what == "no plugin layer" else plugin,
        "IPluginRegistry.load_library": None if what == "a library that does not load" else object(),
        "IPluginRegistry.get_creator": None if what == "a library without plugins" else object(),
        "OnnxParser.parse_from_file": what != "a refused graph",
        "OnnxParser.num_errors": 5,
        "OnnxParser.get_error": trt.ParserError,
        "ParserError.desc": "no importer",
        "ParserError.node_operator": "Odd",
        "ParserError.node_name": lambda number: f"node {number}",
        "IBuilderConfig.add_optimization_profile": -1 if what == "a refused profile" else 0,
        "IBuilderConfig.set_timing_cache": what != "a foreign cache",
        "Builder.build_serialized_network": None if what == "a failed build" else b"an engine",
        **({"IBuilderConfig.create_timing_cache": None} if what == "a damaged cache" else {}),
        "ITimingCache.serialize": b"timings",
    }


class SharedRegistry:
    """The registry that all share, which Python plugins register with: there is none over stubs."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.calls.append(f"register_creator {namespace}::{creator.name}")
        self.creator = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creator


def outcome(trt: Any, job: EngineJob, what: str) -> dict[str, Any]:
    """What the builder returned or raised, and the calls that it made."""
    module: Any = CheckedModule(trt, answers(trt, what), starts=("Builder", "OnnxParser"))
    trt.get_plugin_registry = lambda: SharedRegistry(module.calls)
    try:
        facts = build(trt if what == "the real constructor" else module, job, lambda *progress: None)
    except ZrewardError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"facts": [facts.tensorrt_version, facts.inputs, facts.plugin_layers], "calls": module.calls}


def refused_misuse(trt: Any) -> list[str]:
    """Which calls that no version takes are refused: what this check is worth."""
    module = CheckedModule(trt, {}, starts=("Builder",))
    builder = module.Builder(trt.Logger())
    misuse = {
        "a name that is gone": lambda: builder.build_cuda_engine(builder.create_network()),
        "a keyword that it lacks": lambda: builder.create_network(flag=1),
        "a type that it lacks": lambda: builder.create_network("strongly typed"),
        "an argument too few": lambda: builder.build_serialized_network(builder.create_network()),
        "an object of another class": lambda: builder.create_builder_config().add_optimization_profile(
            builder
        ),
        "a property that is read alone": lambda: setattr(builder.create_network(), "num_inputs", 1),
        "an enumeration of another kind": lambda: builder.create_builder_config().clear_flag(
            trt.DataType.HALF
        ),
    }
    refused = []
    for name, call in misuse.items():
        try:
            call()
        except (AssertionError, AttributeError):
            refused.append(name)
    assert len(refused) == len(misuse), set(misuse) - set(refused)
    return refused


def main() -> None:
    """Print the outcome of each job, by what the library is made to say."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    parsed = {what: dataclass_from_json(EngineJob, job, "job", ExportError) for what, job in jobs.items()}
    results = {what: outcome(tensorrt, job, what) for what, job in parsed.items()}
    print(json.dumps({**results, "refused misuse": refused_misuse(tensorrt)}))


if __name__ == "__main__":
    main()
