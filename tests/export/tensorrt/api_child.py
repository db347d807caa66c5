"""Runs the builder over the real bindings of one version, in a process whose loader finds the stub libraries.

python -m tests.export.tensorrt.api_child FOLDER_OF_THE_BINDINGS JOB.json WHAT
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.support.tensorrt_api import CheckedModule
from zreward.errors import ExportError
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
        "IPluginRegistry.load_library": None if what == "a bad library" else object(),
        "OnnxParser.parse_from_file": what != "a refused graph",
        "OnnxParser.num_errors": 5,
        "OnnxParser.get_error": trt.ParserError,
        "ParserError.desc": "no importer",
        "ParserError.node_operator": "Odd",
        "ParserError.node_name": lambda number: f"node {number}",
        "IBuilderConfig.add_optimization_profile": -1 if what == "a refused profile" else 0,
        "IBuilderConfig.set_timing_cache": what != "a foreign cache",
        "Builder.build_serialized_network": None if what == "a failed build" else b"an engine",
        "ITimingCache.serialize": b"timings",
    }


def outcome(trt: Any, job: EngineJob, what: str) -> dict[str, Any]:
    """What the builder returned or raised, and the calls that it made."""
    module = CheckedModule(trt, answers(trt, what), starts=("Builder", "OnnxParser"))
    try:
        facts = build(trt if what == "the real constructor" else module, job, lambda *progress: None)  # type: ignore[arg-type]
    except ExportError as error:
        return {"error": str(error)}
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
    folder, jobs_file = sys.argv[1:]
    sys.path.insert(0, folder)
    trt = importlib.import_module("tensorrt_bindings")
    jobs = json.loads(Path(jobs_file).read_text())
    parsed = {what: dataclass_from_json(EngineJob, job, "job", ExportError) for what, job in jobs.items()}
    results = {what: outcome(trt, job, what) for what, job in parsed.items()}
    print(json.dumps({**results, "refused misuse": refused_misuse(trt)}))


if __name__ == "__main__":
    main()
