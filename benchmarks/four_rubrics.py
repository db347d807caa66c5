"""Four rubrics of one image: this runtime against transformers' four passes, in one interleaved run.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B
    zreward export build/random-0.8B -o build/bundle-0.8B --no-parity
    python benchmarks/four_rubrics.py build/random-0.8B build/bundle-0.8B

Every system answers the same prompt about the same picture with the same tokens. A repetition runs each system once, in
turn, so that a change of the machine's speed meets all of them; quoted are medians and the ratios of each repetition.
With "nothing kept" the whole prefix is read; with a "new prompt" the system text is kept, as a scorer keeps it; a "next
candidate" finds the prompt kept too. "One of many candidates" is a share of `--candidates` images of a prompt that is
new, in one call of `Scorer.score`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zreward.bundle import Bundle
from zreward.image import preprocess
from zreward.reference import ReferenceModel
from zreward.runtime import Scorer
from zreward.runtime.engine import DecoderState, Engine

PROMPT = "a red fox in the snow under a full moon, watercolour"
CANDIDATES = "one of many candidates, new prompt"
REFERENCE = "transformers, four passes"
RATIOS = (
    ("four rubrics, nothing kept", "one rubric, nothing kept"),
    ("four rubrics, new prompt", "one rubric, new prompt"),
    (CANDIDATES, "four rubrics, nothing kept"),
    (CANDIDATES, "four rubrics, new prompt"),
    (REFERENCE, "four rubrics, nothing kept"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=16, help="images of one prompt")
    parser.add_argument("--without-transformers", action="store_true", help="only this runtime")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine = Engine(Bundle.open(arguments.bundle), threads=arguments.threads)
    picture = noise(arguments.image_size)
    system, prompts = engine.system_state(), itertools.count()
    prompt = engine.prompt_state(PROMPT, system)
    scorer, difference = Scorer(engine), None
    with ExitStack() as stack:
        systems: dict[str, Callable[[], Any]] = {
            "four rubrics, nothing kept": lambda: ask(engine, picture, None),
            "one rubric, nothing kept": lambda: ask(engine, picture, [0]),
            "four rubrics, new prompt": lambda: ask(engine, picture, None, system),
            "one rubric, new prompt": lambda: ask(engine, picture, [0], system),
            "four rubrics, next candidate": lambda: after_prompt(engine, prompt, picture, None),
            CANDIDATES: lambda: scorer.score(
                prompt=f"{PROMPT}, take {next(prompts):06d}", images=[picture] * arguments.candidates
            ),
        }
        if not arguments.without_transformers:
            reference = stack.enter_context(ReferenceModel(arguments.checkpoint))
            systems[REFERENCE] = lambda: reference.probabilities(PROMPT, picture)
            expected = reference.probabilities(PROMPT, picture)
            difference = float(np.abs(ask(engine, picture, None) - expected).max())
        samples: dict[str, list[float]] = {name: [] for name in systems}
        for repetition in range(-1, arguments.repetitions):
            for name, run in systems.items():
                start = time.perf_counter()
                run()
                if repetition >= 0:  # the first one warms up
                    samples[name].append(time.perf_counter() - start)
    samples[CANDIDATES] = [seconds / arguments.candidates for seconds in samples[CANDIDATES]]
    report(samples, difference, arguments)


def ask(
    engine: Engine, picture: Image.Image, dimensions: list[int] | None, system: DecoderState | None = None
) -> np.ndarray:
    """Everything from the decoded picture to the probabilities, [dimensions, bins].

    `system` is the state after the system text, where it was kept.
    """
    state = engine.prompt_state(PROMPT, system or engine.system_state())
    return after_prompt(engine, state, picture, dimensions)


def after_prompt(
    engine: Engine, state: DecoderState, picture: Image.Image, dimensions: list[int] | None
) -> np.ndarray:
    patches = preprocess(picture, engine.contract.image)
    features = engine.encode_image(patches)
    image = engine.image_state(state, [features], patches.token_grid)
    return engine.answer(image, dimensions).probs[0]


def noise(side: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def report(samples: dict[str, list[float]], difference: float | None, arguments: argparse.Namespace) -> None:
    print(f"{arguments.image_size}×{arguments.image_size}, {arguments.threads} threads, {machine()}")
    for name, seconds in samples.items():
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{name:<36} median {statistics.median(seconds):7.3f} s  ({spread})")
    for name, under in RATIOS:
        if name in samples:
            print(f"{name} / {under}: {ratio(samples, name, under):.3f}")
    if difference is not None:
        print(f"largest difference of a bin probability to transformers: {difference:.1e}")
    if arguments.json:
        packages = ("torch", "transformers", "onnxruntime", "mobius-onnx")
        result = {
            "machine": machine(),
            "versions": {name: version(name) for name in packages},
            "image_size": arguments.image_size,
            "threads": arguments.threads,
            "candidates": arguments.candidates,
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
