"""Four rubrics of one image: this runtime against transformers' four passes, in one interleaved run.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B
    zreward export build/random-0.8B -o build/bundle-0.8B --no-parity
    python benchmarks/four_rubrics.py build/random-0.8B build/bundle-0.8B

Every system answers the same prompt about the same picture with the same tokens. A repetition runs each
system once, in turn, so that a change of the machine's speed meets all of them; quoted are medians and
the ratios of each repetition. "Cold" includes the prompt's prefix; "next candidate" finds it cached.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zreward.image import preprocess
from zreward.reference import ReferenceModel
from zreward.runtime.engine import Engine

PROMPT = "a red fox in the snow under a full moon, watercolour"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from zreward.bundle import Bundle

    engine = Engine(Bundle.open(arguments.bundle), threads=arguments.threads)
    picture = noise(arguments.image_size)
    with ReferenceModel(arguments.checkpoint) as reference:
        systems: dict[str, Callable[[], Any]] = {
            "four rubrics, cold": lambda: ask(engine, picture, None),
            "one rubric, cold": lambda: ask(engine, picture, [0]),
            "four rubrics, next candidate": next_candidate(engine, picture),
            "transformers, four passes": lambda: reference.probabilities(PROMPT, picture),
        }
        difference = np.abs(ask(engine, picture, None) - reference.probabilities(PROMPT, picture)).max()
        samples = {name: [] for name in systems} | {}
        for _ in range(arguments.repetitions):
            for name, run in systems.items():
                start = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - start)
    report(samples, float(difference), arguments)


def ask(engine: Engine, picture: Image.Image, dimensions: list[int] | None) -> np.ndarray:
    """Everything from the decoded picture to the probabilities, [dimensions, bins]."""
    return after_prompt(engine, engine.prompt_state(PROMPT), picture, dimensions)


def next_candidate(engine: Engine, picture: Image.Image) -> Callable[[], np.ndarray]:
    state = engine.prompt_state(PROMPT)
    return lambda: after_prompt(engine, state, picture, None)


def after_prompt(
    engine: Engine, state: Any, picture: Image.Image, dimensions: list[int] | None
) -> np.ndarray:
    patches = preprocess(picture, engine.contract.image)
    features = engine.encode_image(patches)
    image = engine.image_state(state, [features], patches.token_grid)
    return engine.answer(image, dimensions).probs[0]


def noise(side: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def report(samples: dict[str, list[float]], difference: float, arguments: argparse.Namespace) -> None:
    print(f"{arguments.image_size}×{arguments.image_size}, {arguments.threads} threads, {machine()}")
    print(f"largest difference of a bin probability to transformers: {difference:.1e}")
    for name, seconds in samples.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:<30} median {statistics.median(seconds):6.2f} s  ({spread})")
    print(f"four rubrics / one rubric:     {ratio(samples, 'four rubrics, cold', 'one rubric, cold'):.3f}")
    print(
        f"transformers / four rubrics:   {ratio(samples, 'transformers, four passes', 'four rubrics, cold'):.2f}"
    )
    if arguments.json:
        packages = ("torch", "transformers", "onnxruntime", "mobius-onnx")
        result = {
            "machine": machine(),
            "versions": {name: version(name) for name in packages},
            "image_size": arguments.image_size,
            "threads": arguments.threads,
            "max_probability_difference": difference,
            "seconds": samples,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def ratio(samples: dict[str, list[float]], over: str, under: str) -> float:
    """Median over the repetitions of the ratio within a repetition."""
    return statistics.median(a / b for a, b in zip(samples[over], samples[under], strict=True))


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    vnni = any("avx512_vnni" in line for line in lines)
    return f"{model}{' with AVX512-VNNI' if vnni else ''}, {os.cpu_count()} cores, {platform.system()}"


if __name__ == "__main__":
    main()
