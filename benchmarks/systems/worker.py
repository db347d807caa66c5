"""What the workers of benchmarks/latency.py share: the job that they are given, and lines of JSON on stdin and stdout.

A worker is one system in a process of its own, so that every system has its own environment. It loads its model,
says so with one line, then answers each line `{"job": PATH}` by running the whole work once, and ends with its
input. This file needs nothing but numpy.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEEP = ("nothing", "system", "text")
"""What a system has kept from runs before: nothing, the states after the system text, or those after the prompt too."""

Ids = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Job:
    """One image and all questions about it, as tokens, positions and pixels: the same for every system.

    Attributes:
        prompt: text that the image was generated from; `prefix_ids` contain it.
        n_system_ids: tokens at the beginning of `prefix_ids` that every prompt shares.
        n_text_ids: tokens at the beginning of `prefix_ids` that every candidate of the prompt shares.
        prefix_ids: [n], system text, prompt, image placeholders and the end of the image.
        prefix_positions: M-RoPE positions of them, [3, n] (time, height, width).
        suffix_ids: [dimensions, longest], one question a row, right-padded by its own last token.
        suffix_lengths: [dimensions], tokens of each question.
        suffix_positions: [3, longest], the same for every question.
        pixel_values: float32 [patches, values of a patch].
        image_grid_thw: [1, 3], patches in time, height and width.
        merge_size: patches per side of a language token.
        image_token_id: the placeholder's id.
        code_ids: [bins], ids of the answers.
        temperatures: [dimensions], score logits are divided by them.
    """

    prompt: str
    n_system_ids: int
    n_text_ids: int
    prefix_ids: Ids
    prefix_positions: Ids
    suffix_ids: Ids
    suffix_lengths: Ids
    suffix_positions: Ids
    pixel_values: NDArray[np.float32]
    image_grid_thw: Ids
    merge_size: int
    image_token_id: int
    code_ids: Ids
    temperatures: NDArray[np.float64]

    def save(self, path: Path) -> None:
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def load(path: Path) -> Job:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        names = ("prompt", "n_system_ids", "n_text_ids", "merge_size", "image_token_id")
        scalars = {name: arrays.pop(name).item() for name in names}
        return Job(**arrays, **scalars)

    def n_kept_ids(self, keep: str) -> int:
        """Tokens whose states a system starts from: see `KEEP`."""
        return {"nothing": 0, "system": self.n_system_ids, "text": self.n_text_ids}[keep]

    @property
    def n_questions(self) -> int:
        return len(self.suffix_lengths)

    def question_ids(self, index: int) -> Ids:
        """One question without padding."""
        ids: Ids = self.suffix_ids[index, : self.suffix_lengths[index]]
        return ids

    def probabilities(self, code_logits: Floats) -> NDArray[np.float64]:
        """Softmax of the logits of the codes, [dimensions, bins]."""
        scaled = code_logits.astype(np.float64) / self.temperatures[:, None]
        exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        result: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return result


@dataclass
class Parts:
    """Seconds of the named parts of one run; a part that runs several times is summed."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


Run = Callable[[Job, Parts], Floats]
"""The whole work on a job, with its parts timed: probabilities [dimensions, bins]."""


@dataclass(frozen=True)
class Loaded:
    """A system that is ready.

    Attributes:
        run: the work.
        settings: what was chosen, for the report.
        check: looks at a job before its first run, outside the measurement, and raises if the system would
            see other tokens than the others do.
    """

    run: Run
    settings: dict[str, Any]
    check: Callable[[Job], None] = lambda job: None


def serve(system: str, packages: Sequence[str], load: Callable[[], Loaded]) -> None:
    """Load, say ready, answer jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    start = time.perf_counter()
    loaded = load()
    ready = {
        "ready": True,
        "system": system,
        "versions": _versions(packages),
        "settings": loaded.settings,
        "load_seconds": time.perf_counter() - start,
    }
    print(json.dumps(ready), file=answers)
    checked = set()
    for line in sys.stdin:
        path = json.loads(line)["job"]
        job = Job.load(Path(path))
        if path not in checked:
            loaded.check(job)
            checked.add(path)
        parts = Parts()
        start = time.perf_counter()
        probabilities = loaded.run(job, parts)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "parts": parts.seconds, "probabilities": probabilities.tolist()}
        print(json.dumps(answer), file=answers)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
