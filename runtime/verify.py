"""Verification of a bundle: every file hashed, its engines included, every golden input replayed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zreward.bundle import Bundle, check_files
from zreward.engines import engines_of
from zreward.errors import BundleError
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.engine import Engine
from zreward.runtime.scorer import Scorer


@dataclass(frozen=True)
class VerifyReport:
    """What a successful verification saw.

    Attributes:
        n_files: files hashed.
        n_golden: golden inputs replayed.
        max_probability_difference: largest absolute difference of a bin probability.
        tolerance: what the manifest allows.
        provider: that replayed them, never "auto".
        backend: the same, for people.
    """

    n_files: int
    n_golden: int
    max_probability_difference: float
    tolerance: float
    provider: str
    backend: str


def verify_bundle(
    path: str | Path, *, provider: str = "auto", threads: int | None = None, gpu: GpuOptions | None = None
) -> VerifyReport:
    """Hash the files of the bundle at `path` and replay its golden inputs; arguments as of `Scorer.open`.

    Raises:
        BundleError: a file or an engine is missing or altered, or a golden score differs by more than the tolerance.
        BackendError: what the provider needs is missing, or it refuses the graphs.
        PluginError: the engine's library of plugins was altered, or does not fit.
    """
    bundle = Bundle.open(path)
    check_files(bundle)
    engines = engines_of(bundle)
    for engine in engines:
        engine.check_files()
    items = bundle.golden_items()
    largest = 0.0
    with Scorer(Engine(bundle, provider=provider, threads=threads, gpu=gpu)) as scorer:
        opened = scorer.engine.opened
        for item in items:
            score = scorer.score(prompt=item.prompt, images=[bundle.path / item.image])[0]
            for name, expected in item.probs.items():
                largest = max(largest, float(np.abs(score[name].probs - np.array(expected)).max()))
    tolerance = bundle.manifest.golden.tolerance
    if not largest <= tolerance:
        raise BundleError(
            f"{bundle.path}: replayed golden scores differ by {largest:.2e} in a bin probability, more than "
            f"the {tolerance:.0e} that the bundle allows; this backend or processor computes otherwise"
        )
    n_files = len(bundle.manifest.files) + sum(len(engine.info.graphs) for engine in engines)
    return VerifyReport(n_files, len(items), largest, tolerance, opened.provider, opened.details)
