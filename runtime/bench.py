"""How long a bundle takes on this machine, stage by stage and end to end.

Each repetition runs the stages one after the other on the same image, as `Scorer` does, and then scores
the image twice through `Scorer` itself: once under a prompt that was never seen, once under the same
prompt again, where the prompt's part of the prefix is cached. Raw samples stay in the report, because a
median without its spread says little on a machine that does other things too.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zreward import __version__
from zreward.errors import UsageError
from zreward.image import preprocess
from zreward.progress import Progress
from zreward.runtime.scorer import Scorer

REPORT_VERSION = 1
MIN_REPETITIONS = 10
WARM_UP = 2

STAGES = {
    "decode": "decode and resize",
    "vision": "vision tower",
    "prompt_prefix": "prompt prefix",
    "image_prefix": "image prefix",
    "questions": "all questions",
    "new_prompt": "end to end, new prompt",
    "same_prompt": "end to end, same prompt",
}
"""Keys of a report and what they are called for people. The last two include the ones above them, the
very last without the prompt prefix."""

_PROMPT = "a red cube left of a blue ball, a photograph in the evening light"
_PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime")


@dataclass(frozen=True)
class StageTiming:
    """Milliseconds of one stage: every sample, in the order taken, and what is read from them."""

    samples_ms: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """The `q`-th percentile in milliseconds, linearly interpolated."""
        return float(np.percentile(self.samples_ms, q))

    def to_dict(self) -> dict[str, Any]:
        return {
            "min_ms": self.percentile(0),
            "median_ms": self.percentile(50),
            "p90_ms": self.percentile(90),
            "p99_ms": self.percentile(99),
            "max_ms": self.percentile(100),
            "samples_ms": list(self.samples_ms),
        }


@dataclass(frozen=True)
class SizeTiming:
    """The stages of one image size; `n_tokens` are the language tokens that the image becomes."""

    image_size: int
    n_tokens: int
    stages: dict[str, StageTiming]

    def to_dict(self) -> dict[str, Any]:
        stages = {name: timing.to_dict() for name, timing in self.stages.items()}
        return {"image_size": self.image_size, "n_tokens": self.n_tokens, "stages": stages}


@dataclass(frozen=True)
class BenchReport:
    """What `zreward bench` measured, on what and with what."""

    bundle: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    results: tuple[SizeTiming, ...]

    def to_dict(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "results"}
        results = [result.to_dict() for result in self.results]
        return {"schema": "zreward.bench", "version": REPORT_VERSION, **fields, "results": results}


def run_bench(
    scorer: Scorer,
    image_sizes: Sequence[int],
    *,
    repetitions: int = 20,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure square images of each side in `image_sizes`, in pixels.

    Args:
        threads: what the scorer was opened with, for the report.

    Raises:
        UsageError: fewer than `MIN_REPETITIONS`, or a size below one pixel.
    """
    if repetitions < MIN_REPETITIONS:
        raise UsageError(f"{repetitions} repetitions are too few for a spread; use {MIN_REPETITIONS} or more")
    if not image_sizes or min(image_sizes) < 1:
        raise UsageError(f"image sizes must be at least one pixel: {list(image_sizes)}")
    machine = describe_machine()  # before the work, so that the load is not our own
    results = tuple(_measure(scorer, size, repetitions, progress) for size in image_sizes)
    return BenchReport(
        bundle={
            "path": str(scorer.bundle.path),
            "sha256": scorer.bundle.sha256,
            "contract": scorer.bundle.contract.sha256,
        },
        machine=machine,
        versions=_versions(),
        settings={"threads": threads, "warm_up": WARM_UP, "repetitions": repetitions, "prompt": _PROMPT},
        results=results,
    )


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and load, as far as the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {
        "processor": _processor_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu_count": os.cpu_count(),
        "usable_cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "load_average": None if load is None else list(load),
    }


def _measure(scorer: Scorer, size: int, repetitions: int, progress: Progress | None) -> SizeTiming:
    data = _png(size)
    samples: dict[str, list[float]] = {name: [] for name in STAGES}
    total = WARM_UP + repetitions
    for repetition in range(total):
        # A new prompt each time: the same one would come from the cache.
        prompt = f"{_PROMPT}, {size} pixels, take {repetition}"
        durations = _stage_durations(scorer, prompt, data) | _end_to_end_durations(scorer, prompt, data)
        if repetition >= WARM_UP:
            for name, duration in durations.items():
                samples[name].append(duration)
        if progress:
            progress(f"{size}×{size}", repetition + 1, total)
    timings = {name: StageTiming(tuple(values)) for name, values in samples.items()}
    return SizeTiming(size, preprocess(data, scorer.bundle.contract.image).n_tokens, timings)


def _stage_durations(scorer: Scorer, prompt: str, data: bytes) -> dict[str, float]:
    engine, clock = scorer.engine, time.perf_counter
    marks = [clock()]
    patches = preprocess(data, scorer.bundle.contract.image)
    marks.append(clock())
    features = engine.encode_image(patches)
    marks.append(clock())
    state = engine.prompt_state(prompt)
    marks.append(clock())
    state = engine.image_state(state, [features], patches.token_grid)
    marks.append(clock())
    engine.answer(state)
    marks.append(clock())
    durations = (1e3 * (end - start) for start, end in itertools.pairwise(marks))
    return dict(zip(STAGES, durations, strict=False))  # the stages; the two ends come after them


def _end_to_end_durations(scorer: Scorer, prompt: str, data: bytes) -> dict[str, float]:
    durations = {}
    for name in ("new_prompt", "same_prompt"):
        start = time.perf_counter()
        scorer.score(prompt=f"{prompt}, once more", images=[data])
        durations[name] = 1e3 * (time.perf_counter() - start)
    return durations


def _png(size: int) -> bytes:
    """A smooth, faintly noisy picture: decoding and resizing cost about what they do for real ones."""
    ramp = np.linspace(0, 200, size)
    pixels = np.stack([ramp[None, :] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None, :]], axis=-1)
    pixels = np.concatenate([pixels, pixels.mean(axis=-1, keepdims=True)], axis=-1)
    pixels += np.random.default_rng(0).uniform(0, 20, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"zreward": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
