"""This project's runtime on a bundle: prompt, image and questions each run once, the questions as one batch.

The environment needs `pip install -e '.[cpu]' -c constraints.txt`. The engine is given what `Scorer` gives it, so
the time includes the prompt's tokens; it starts without a cached prompt, unless --keep says that states are kept from
the run before, as `Scorer` keeps them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from worker import KEEP, Floats, Job, Loaded, Parts, serve

from zreward.bundle import Bundle
from zreward.image import Patches
from zreward.runtime.engine import DecoderState, Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--keep", choices=KEEP, default="nothing")
    arguments = parser.parse_args()
    packages = ("zreward", "onnxruntime", "tokenizers", "numpy")
    serve("zreward", packages, lambda: load(arguments.bundle, arguments.threads, arguments.keep))


def load(path: Path, threads: int, keep: str) -> Loaded:
    bundle = Bundle.open(path)
    engine = Engine(bundle, provider="cpu", threads=threads)
    kept: dict[str, DecoderState] = {}

    def run(job: Job, parts: Parts) -> Floats:
        patches = patches_of(job)
        with parts.timed("vision"):
            features = engine.encode_image(patches)
        with parts.timed("prefix"):
            state = kept.get(job.prompt)
            if state is None:
                system = engine.system_state() if keep == "nothing" else None
                state = engine.prompt_state(job.prompt, system)
            if keep == "text":
                kept[job.prompt] = state
            state = engine.image_state(state, [features], patches.token_grid)
        with parts.timed("suffixes"):
            return engine.answer(state).probs[0]

    quantization = bundle.manifest.quantization or {}
    settings = {
        "bundle": path.name,
        "sha256": bundle.sha256,
        "weights": bundle.manifest.weights,
        "quantization": {
            key: quantization[key] for key in ("scheme", "method", "bits_per_weight") if key in quantization
        },
        "provider": "cpu",
        "threads": threads,
        "kept": keep,
    }
    return Loaded(run, settings, lambda job: check(engine, job))


def patches_of(job: Job) -> Patches:
    time, height, width = job.image_grid_thw[0].tolist()
    return Patches(job.pixel_values, (time, height, width), job.merge_size)


def check(engine: Engine, job: Job) -> None:
    """The engine makes its own tokens; they must be the job's."""
    encoder = engine.encoder
    n_tokens = patches_of(job).n_tokens
    for index in range(job.n_questions):
        expected = np.concatenate([job.prefix_ids, job.question_ids(index)])
        if not np.array_equal(encoder.sequence_ids(job.prompt, n_tokens, index), expected):
            raise SystemExit(f"question {index}: the bundle's tokens differ from the job's; export it again")
    if not np.allclose(engine.contract.temperatures, job.temperatures):
        raise SystemExit("the bundle's temperatures differ from the job's; export it again")


if __name__ == "__main__":
    main()
