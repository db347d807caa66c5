"""What a process with onnxruntime-gpu over the libraries of tests/support/cuda_stubs.py does; prints one JSON value.

python -m tests.runtime.cuda_child NAME ARGUMENT...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from zreward.bundle import Bundle
from zreward.errors import ZrewardError
from zreward.image import preprocess
from zreward.runtime.backends import ort_gpu
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.conformance import ConformancePlan, gpu, run_conformance, shapes, timing
from zreward.runtime.engine import DecoderState, Engine

SIZES = (
    {"batch": 1, "sequence_len": 40, "state_batch": 1, "past_sequence_len": 0, "total_patches": 24},
    {"batch": 2, "sequence_len": 33, "state_batch": 1, "past_sequence_len": 40, "total_patches": 96},
    {"batch": 8, "sequence_len": 6, "state_batch": 2, "past_sequence_len": 73, "total_patches": 64},
    {"batch": 1, "sequence_len": 1, "state_batch": 1, "past_sequence_len": 5, "total_patches": 4},
)
_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def graphs(folder: str) -> dict[str, Any]:
    """Of each graph in the folder: what is left to the CPU, and the shapes of the outputs for several sizes."""
    found = {}
    for path in sorted(Path(folder).glob("*.onnx")):
        try:
            session = ort_gpu._session(onnxruntime, path, "cuda", 1, GpuOptions())
            placed = session.get_provider_graph_assignment_info()
            left = {n.op_type for part in placed if part.ep_name.startswith("CPU") for n in part.get_nodes()}
            shapes = [_run(session, sizes) for sizes in SIZES]
        except Exception as error:  # the parent shows it
            found[path.stem] = {"error": str(error)}
        else:
            found[path.stem] = {"cpu": sorted(left), "shapes": shapes}
    return found


def _run(session: Any, sizes: dict[str, int]) -> dict[str, list[int]]:
    inputs = {
        value.name: np.zeros([_size(axis, sizes) for axis in value.shape], _TYPES[value.type])
        for value in session.get_inputs()
    }
    names = [value.name for value in session.get_outputs()]
    return {n: list(array.shape) for n, array in zip(names, session.run(names, inputs), strict=True)}


def _size(axis: int | str, sizes: dict[str, int]) -> int:
    """Of an axis that has a size, one of scoring, or another that varies."""
    text = str(axis)
    return int(text) if text.isdecimal() else sizes.get(text, sizes["batch"])


def loads(path: str) -> str:
    """Why a graph does not load on the GPU; nothing where it does."""
    try:
        ort_gpu._session(onnxruntime, Path(path), "cuda", None, GpuOptions())
    except ZrewardError as error:
        return str(error)
    return ""


def moves(path: str) -> dict[str, Any]:
    """A graph that adds nothing to its state, run twice; the state of the first run goes into the second."""
    session = ort_gpu._session(onnxruntime, Path(path), "cuda", None, GpuOptions(memory_bytes=1 << 28))
    wrapped = ort_gpu.GpuSession(session, ["state_out"], 0, "onnxruntime")
    x, state = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float32).reshape(1, 4)
    y, first = wrapped.run(["y", "state_out"], {"x": x[:, ::-1], "state": state})
    again, second = wrapped.run(["y", "state_out"], {"x": x, "state": first})
    (plain,) = wrapped.run(["y"], {"x": x[:1], "state": np.zeros((0, 4), np.float32)})
    return {
        "kinds": [type(value).__name__ for value in (y, first, second, plain)],
        "y": [y.tolist(), again.tolist(), plain.tolist()],
        "state": [
            np.asarray(first).tolist(),
            np.asarray(second).tolist(),
            list(first.shape),
            str(first.dtype),
        ],
    }


def stages(path: str, provider: str) -> dict[str, Any]:
    """The stages of a score, with what each leaves where; kernels do not compute, so answers are not looked at."""
    bundle = Bundle.open(path)
    engine = Engine(bundle, provider=provider)
    image = next((bundle.path / "golden").glob("*.png"))
    patches = preprocess(image, bundle.contract.image)
    features = engine.encode_image(patches)
    prompt = engine.prompt_state("a red ball")
    images = engine.image_state(prompt, [features, features], patches.token_grid)
    answers = engine.answer(images)
    return {
        "provider": engine.opened.provider,
        "packages": list(engine.opened.packages),
        "features": [type(features).__name__, *features.shape],
        "states": {"prompt": _states(prompt), "images": _states(images)},
        "probs": list(answers.probs.shape),
    }


def _states(state: DecoderState) -> dict[str, Any]:
    kinds = sorted({type(array).__name__ for array in state.arrays.values()})
    return {"kinds": kinds, "shapes": [list(array.shape) for array in state.arrays.values()]}


def opens(*asked: str) -> list[str]:
    """Open bundles, each asked for as PATH PROVIDER OPTIONS; of each who runs it, or the error that says why nobody."""
    return [_opened(*asked[i : i + 3]) for i in range(0, len(asked), 3)]


def _opened(path: str, provider: str, options: str) -> str:
    try:
        return Engine(Bundle.open(path), provider=provider, gpu=GpuOptions.parse(options)).opened.provider
    except ZrewardError as error:
        return f"{type(error).__name__}: {error}"


def conforms(path: str, options: str) -> dict[str, Any]:
    """The report of `zreward conformance --provider cuda`, of few sizes."""

    def build(*_: object) -> None:
        raise AssertionError("there is no engine to build")

    every = shapes.shapes_of
    shapes.shapes_of = lambda *given: every(*given)[-2:]
    timing.WARM_UP = gpu._COPIED_BYTES = 1
    plan = ConformancePlan("cuda", gpu=GpuOptions.parse(options), cycles=2, repetitions=1, threads=1)
    return run_conformance(path, plan, build=build).to_dict()


if __name__ == "__main__":
    functions: dict[str, Callable[..., Any]] = {
        f.__name__: f for f in (graphs, loads, moves, stages, opens, conforms)
    }
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])))
