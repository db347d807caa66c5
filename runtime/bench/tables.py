"""The report in rows and columns, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from zreward.jsonfile import write_text
from zreward.runtime.bench.machine import Machine
from zreward.runtime.bench.plan import threads_label
from zreward.runtime.bench.report import BenchReport, Result, Session, Timing
from zreward.runtime.bench.stages import PARTS, STAGES

Row = tuple[str, ...]

STAGE_COLUMNS = ("milliseconds", "min", "median", "p90", "p99", "max", "IQR", "bound", "share")
SUMMARY_COLUMNS = (
    "image",
    "cand.",
    "threads",
    "new\nprompt",
    "same\nprompt",
    "images/s",
    "scores/s",
    "peak\nMB",
)
START_COLUMNS = ("process start to first score", "import", "open", "first\nscore", "all", "peak\nMB")

DEFINITIONS = (
    "IQR is the range from the 25th to the 75th percentile. The bound is the time of the multiplications and additions "
    "alone at the rate of this machine, and share how much of the median that is.",
    "A score is one image, judged on all dimensions. images/s counts images that decoding and the vision tower see, "
    "scores/s scores end to end with the prompt in the cache. New and same prompt are medians in milliseconds.",
)

_HASH_DIGITS = 16  # the JSON file has all of them


def milliseconds(value: float) -> str:
    """Three or four digits."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def per_second(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def stage_rows(result: Result) -> list[Row]:
    """One row for each stage; those that include others come last, see `PARTS`."""
    names = [name for name in STAGES if name in result.stages]
    return [_stage_row(STAGES[name], result.stages[name]) for name in names]


def timings(result: Result) -> list[Timing]:
    """What the rows of `stage_rows` are made of."""
    return [result.stages[name] for name in STAGES if name in result.stages]


def stage_title(result: Result) -> str:
    """What the table of `stage_rows` is about, in two lines."""
    tokens = result.tokens
    return (
        f"{result.configuration.label}\n"
        f"{tokens.image - 1:,} image tokens after {tokens.system + tokens.prompt:,} of text, "
        f"{result.repetitions:,} repetitions"
    )


def n_parts(result: Result) -> int:
    """How many of the rows of `stage_rows` are stages that follow each other."""
    return len(PARTS)


def summary_rows(results: Iterable[Result]) -> list[Row]:
    """One row for each configuration."""
    rows: list[Row] = []
    for result in results:
        one = result.configuration
        threads = "default" if one.threads is None else str(one.threads)
        rows.append(
            (
                f"{one.image_size}²",
                str(one.candidates),
                threads if one.provider == "auto" else f"{threads}, {one.provider}",
                milliseconds(result.stages["new_prompt"].median_ms),
                milliseconds(result.stages["same_prompt"].median_ms),
                per_second(result.images_per_s),
                per_second(result.scores_per_s["same_prompt"]),
                _megabytes(result.peak_memory_bytes),
            )
        )
    return rows


def start_rows(sessions: Iterable[Session]) -> list[Row]:
    """One row for each provider and thread count: medians over its processes."""
    return [
        (
            f"{threads_label(s.threads)}, {s.provider}, median of {len(s.starts)}",
            *(seconds(s.median_start(name)) for name in ("import_s", "open_s", "first_score_s", "total_s")),
            _megabytes(s.peak_memory_bytes),
        )
        for s in sessions
    ]


def facts(report: BenchReport) -> dict[str, str]:
    """What was measured, on what and with what."""
    bundle, machine = report.bundle, report.machine
    sizes = f"{bundle.parameters / 1e6:,.1f} M parameters, {bundle.n_bytes / 1e6:,.1f} MB"
    stored = f"quantized {bundle.quantization}" if bundle.quantization else bundle.weights
    return {
        "bundle": f"{bundle.name}, {stored}, {sizes}",
        "sha256": bundle.sha256[:_HASH_DIGITS],
        "contract": f"{bundle.contract_name} {bundle.contract_sha256[:_HASH_DIGITS]}",
        "processor": processor(machine),
        "memory": _megabytes(machine.memory_bytes) + " MB",
        "GPU": "; ".join(f"{gpu.name}, {gpu.memory}, driver {gpu.driver}" for gpu in machine.gpus) or "none",
        "system": machine.system,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "kernels": "compiled, in use" if all(s.kernels for s in report.sessions) else "not in use",
        "rate": "; ".join(dict.fromkeys(_rate_text(s) for s in report.sessions)),
        "date": report.date,
    }


def processor(machine: Machine) -> str:
    """`AMD EPYC, 2 of 2 processors usable, avx2 avx512_vnni`."""
    limit = "" if machine.cpu_limit is None else f", limited to {machine.cpu_limit:g}"
    flags = f", {' '.join(machine.flags)}" if machine.flags else ""
    return (
        f"{machine.processor}, {machine.usable_cpus} of {machine.cpu_count} processors usable{limit}{flags}"
    )


def markdown_report(report: BenchReport) -> str:
    """The whole report as Markdown."""
    parts = [f"# Benchmark of {escaped(report.bundle.name)}", _facts_markdown(facts(report))]
    parts += [f"> {escaped(note)}" for note in report.notes]
    parts += ["## Summary", markdown_table(SUMMARY_COLUMNS, summary_rows(report.results)), *DEFINITIONS]
    parts += ["## Start", markdown_table(START_COLUMNS, start_rows(report.sessions))]
    parts.append("## Stages")
    for result in report.results:
        parts += [
            f"### {stage_title(result)}".replace("\n", "\n\n"),
            markdown_table(STAGE_COLUMNS, stage_rows(result)),
        ]
    return "\n\n".join(parts) + "\n"


def write_markdown(path: Path, report: BenchReport) -> None:
    """Write `markdown_report` to `path` in one step."""
    write_text(path, markdown_report(report))


def markdown_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """A table with the first column left and the others right."""
    lines = [_line(columns), "|---|" + "---:|" * (len(columns) - 1), *map(_line, rows)]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """One line of Markdown that is nothing but text."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _stage_row(name: str, timing: Timing) -> Row:
    figures = (timing.min_ms, timing.median_ms, timing.p90_ms, timing.p99_ms, timing.max_ms, timing.iqr_ms)
    bound = "–" if timing.bound_ms is None else milliseconds(timing.bound_ms)
    return (name, *map(milliseconds, figures), bound, share(timing.share))


def _rate_text(session: Session) -> str:
    rate = session.rate
    threads = f"{rate.threads} thread" + "s" * (rate.threads != 1)
    floats = f"{rate.float_gops:,.0f} GOP/s in float32 with {threads}"
    if rate.bfloat16_gops is not None:
        floats = f"{rate.bfloat16_gops:,.0f} in bfloat16, {floats}"
    if rate.integer_gops is None:
        return f"{floats}, measured with {rate.method}"
    return f"{rate.integer_gops:,.0f} GOP/s in 8-bit whole numbers, {floats}, measured on {rate.method}"


def _megabytes(n_bytes: int | None) -> str:
    return "–" if n_bytes is None else f"{n_bytes / 1e6:,.0f}"


def _facts_markdown(found: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {escaped(value)}" for name, value in found.items())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"
