"""The report of `zreward bench` as data, and its file. docs/bench.md and assets/schemas/bench.schema.json describe it.

Every figure that follows from the samples is checked against them when a file is read: what a comparison shows was
measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zreward.bundle import Bundle
from zreward.errors import BenchError, UsageError
from zreward.jsonfile import dataclass_from_json, read_json_object, write_json
from zreward.runtime.bench.bound import Operations
from zreward.runtime.bench.machine import Machine
from zreward.runtime.bench.plan import BenchPlan, Configuration
from zreward.runtime.bench.rates import Rate
from zreward.runtime.bench.stages import PARTS, STAGES, Tokens

REPORT_VERSION = 2

PERCENTILES = {"min_ms": 0, "median_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one stage: every sample in the order taken, and what follows from them.

    Attributes:
        samples_ms: one for each repetition.
        iqr_ms: the interquartile range, from the 25th to the 75th percentile: the spread. Percentiles are interpolated.
        operations: of one repetition; None for a stage without products, and where the bundle does not count them.
        bound_ms: time of the operations at the machine's rate.
    """

    samples_ms: tuple[float, ...]
    min_ms: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    iqr_ms: float
    operations: Operations | None = None
    bound_ms: float | None = None

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise BenchError("there are no samples")
        wrong = [value for value in self.samples_ms if not (math.isfinite(value) and value > 0)]
        if wrong:
            raise BenchError(f"a sample of {wrong[0]} ms is no duration")
        for name, value in _figures(self.samples_ms).items():
            if not math.isclose(getattr(self, name), value, rel_tol=1e-6, abs_tol=1e-6):
                raise BenchError(
                    f"{name} is {getattr(self, name)}, but its samples give {value}; the file was altered"
                )

    @staticmethod
    def of(
        samples_ms: Sequence[float], operations: Operations | None = None, bound_ms: float | None = None
    ) -> Timing:
        samples = tuple(round(float(value), 6) for value in samples_ms)
        return Timing(samples, **_figures(samples), operations=operations, bound_ms=bound_ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile, in milliseconds."""
        low, high = np.percentile(self.samples_ms, (25, 75))
        return float(low), float(high)

    @property
    def share(self) -> float | None:
        """The bound as a share of the median: 1 is as fast as the machine multiplies."""
        return None if self.bound_ms is None else self.bound_ms / self.median_ms


@dataclass(frozen=True)
class Result:
    """What was measured of one configuration.

    Attributes:
        configuration: what was asked for.
        height, width: of the image after it was resized to the contract's budget.
        tokens: of one repetition.
        stages: by the keys of `STAGES`; "separate" only where it was asked for.
        images_per_s: images that decoding and the vision tower see in a second.
        scores_per_s: scores in a second under a new prompt and under a cached one. A score is one image, judged on all
            dimensions of the contract.
        peak_memory_bytes: resident memory of the process at its most while this was measured; None where the system
            cannot tell configurations apart.
    """

    configuration: Configuration
    height: int
    width: int
    tokens: Tokens
    stages: Mapping[str, Timing]
    images_per_s: float
    scores_per_s: Mapping[str, float]
    peak_memory_bytes: int | None

    def __post_init__(self) -> None:
        missing = sorted(set(STAGES) - {"separate"} - set(self.stages))
        unknown = sorted(set(self.stages) - set(STAGES))
        if missing or unknown:
            raise BenchError(f"stages must be {', '.join(STAGES)}; found {', '.join(self.stages)}")
        if len({len(timing.samples_ms) for timing in self.stages.values()}) > 1:
            raise BenchError("its stages have different numbers of samples")
        expected = _throughput(self.configuration, self.stages)
        found = {"images_per_s": self.images_per_s, **self.scores_per_s}
        if set(found) != set(expected) or any(
            not math.isclose(found[k], v, rel_tol=1e-6) for k, v in expected.items()
        ):
            raise BenchError(
                "images_per_s or scores_per_s do not follow from the samples; the file was altered"
            )

    @staticmethod
    def of(
        configuration: Configuration,
        size: tuple[int, int],
        tokens: Tokens,
        stages: Mapping[str, Timing],
        peak_memory_bytes: int | None,
    ) -> Result:
        scores = _throughput(configuration, stages)
        images = scores.pop("images_per_s")
        return Result(configuration, *size, tokens, stages, images, scores, peak_memory_bytes)

    @property
    def repetitions(self) -> int:
        return len(self.stages["decode"].samples_ms)

    @property
    def parts(self) -> dict[str, Timing]:
        """The stages that follow each other."""
        return {name: self.stages[name] for name in PARTS}


@dataclass(frozen=True)
class Start:
    """One process from its start to its first score, in seconds.

    Attributes:
        import_s: until the runtime was imported.
        open_s: then until the bundle was open.
        first_score_s: then until the first image had its scores, cold.
        total_s: all of it.
    """

    import_s: float
    open_s: float
    first_score_s: float
    total_s: float


@dataclass(frozen=True)
class Session:
    """One provider and thread count: measured in processes of their own.

    Attributes:
        kernels: whether the compiled kernels ran.
        rate: of products, with these threads.
        starts: the last of these processes went on to measure.
        peak_memory_bytes: resident memory of that process at its most.
    """

    provider: str
    threads: int | None
    kernels: bool
    rate: Rate
    starts: tuple[Start, ...]
    peak_memory_bytes: int

    def __post_init__(self) -> None:
        if not self.starts:
            raise BenchError("there are no starts")

    def median_start(self, name: str) -> float:
        """The median of one field of the starts, in seconds."""
        return float(np.median([getattr(start, name) for start in self.starts]))


@dataclass(frozen=True)
class BundleFacts:
    """What was measured: `quantization` is the scheme, None for a bundle that is not quantized."""

    name: str
    sha256: str
    contract_name: str
    contract_sha256: str
    target: str
    weights: str
    quantization: str | None
    parameters: int
    n_bytes: int

    @staticmethod
    def of(bundle: Bundle) -> BundleFacts:
        manifest = bundle.manifest
        return BundleFacts(
            name=bundle.path.resolve().name,
            sha256=bundle.sha256,
            contract_name=bundle.contract.name,
            contract_sha256=bundle.contract.sha256,
            target=manifest.target,
            weights=manifest.weights,
            quantization=None if manifest.quantization is None else str(manifest.quantization.get("scheme")),
            parameters=manifest.model.parameters,
            n_bytes=sum(entry.bytes for entry in manifest.files.values()),
        )


@dataclass(frozen=True)
class BenchReport:
    """What `zreward bench` measured, on what and with what.

    Attributes:
        date: when it began, in UTC.
        prompt: that the candidates were scored under, with a number after it.
        notes: what a reader should know of this run, in sentences.
    """

    date: str
    bundle: BundleFacts
    machine: Machine
    versions: Mapping[str, str]
    plan: BenchPlan
    prompt: str
    sessions: tuple[Session, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.results:
            raise BenchError("there are no results")
        found = [result.configuration for result in self.results]
        if len(set(found)) < len(found):
            raise BenchError("a configuration is there more than once")
        known = {(session.provider, session.threads) for session in self.sessions}
        for one in found:
            if (one.provider, one.threads) not in known:
                raise BenchError(f"the result of {one.label} belongs to no session")

    def session_of(self, result: Result) -> Session:
        """The session that `result` was measured in."""
        wanted = (result.configuration.provider, result.configuration.threads)
        return next(s for s in self.sessions if (s.provider, s.threads) == wanted)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "zreward.bench", "version": REPORT_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str) -> BenchReport:
        """Raises BenchError: another schema or version, or a field that is missing, unknown or impossible."""
        data = dict(data)
        schema, version = data.pop("schema", None), data.pop("version", None)
        if schema != "zreward.bench":
            raise BenchError(f"{where}: not a report of `zreward bench` (schema is {schema!r})")
        if type(version) is not int or version != REPORT_VERSION:
            raise BenchError(
                f"{where}: report version {version!r} is not supported; this zreward reads version "
                f"{REPORT_VERSION}, so run `zreward bench` again"
            )
        try:
            return dataclass_from_json(BenchReport, data, where, BenchError)
        except UsageError as cause:  # a plan that could not have been measured
            raise BenchError(f"{where}: {cause}") from None

    def save(self, path: Path) -> None:
        """Write the report to `path` in one step."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> BenchReport:
        """Raises BenchError: the file cannot be read, or see `from_dict`."""
        return BenchReport.from_dict(read_json_object(path, BenchError), str(path))


def _throughput(configuration: Configuration, stages: Mapping[str, Timing]) -> dict[str, float]:
    """`images_per_s`, and the scores in a second by their stage."""
    n, seen = configuration.candidates, stages["decode"].median_ms + stages["vision"].median_ms
    scores = {name: 1e3 * n / stages[name].median_ms for name in ("new_prompt", "same_prompt")}
    return {"images_per_s": 1e3 * n / seen, **scores}


def _figures(samples_ms: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(samples_ms, (25, 75))
    figures = {name: float(np.percentile(samples_ms, q)) for name, q in PERCENTILES.items()}
    return {**figures, "iqr_ms": float(high - low)}
