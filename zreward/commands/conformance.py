"""`zreward conformance`: proof that a provider computes on this machine what it should."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zreward.commands import console
from zreward.commands.bundles import BundleArgument
from zreward.commands.outputs import check_files, say_written
from zreward.commands.providers import GpuOption, gpu_options
from zreward.errors import UsageError

if TYPE_CHECKING:
    from zreward.progress import Progress
    from zreward.runtime.conformance.reference import OpenRounded
    from zreward.runtime.conformance.report import ConformanceReport, VariantReport
    from zreward.runtime.conformance.variants import Build


def conformance(
    bundle: BundleArgument,
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What to examine: tensorrt, tensorrt-rtx, cuda, ort-tensorrt or cpu."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The report; by default conformance-NAME-DATE.json in this folder.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Build engines anew, also where there are some for this machine.")
    ] = False,
    gpu: GpuOption = "",
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Examine the engine without plugins alone.")
    ] = False,
    cycles: Annotated[
        int, typer.Option(min=2, max=1000, help="Rounds over all sizes, while memory is watched.")
    ] = 3,
    repetitions: Annotated[int, typer.Option(min=1, max=1000, help="Of the stages that are timed.")] = 10,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads, for cpu and the reference.")
    ] = None,
) -> None:
    """Examine a provider on this machine, and write a report that can be sent.

    Golden inputs are compared with ONNX Runtime on the CPU stage by stage; sizes from the largest to the smallest run
    in turn while memory is watched; stages are timed beside their bounds. TensorRT is examined with and without
    plugins. The exit status is 1 if a check fails. docs/conformance.md says what each check is.
    """
    from zreward.runtime.conformance import ConformancePlan, run_conformance

    plan = ConformancePlan(
        provider,
        gpu=gpu_options(gpu),
        without_plugins=no_plugins,
        build=build,
        cycles=cycles,
        repetitions=repetitions,
        threads=threads,
    )
    file = output or Path(f"conformance-{provider}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json")
    check_files(("--output", file))
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file} exists; choose another --output, or replace it with --force")
    with console.progress("%") as progress, console.remembered_interrupt() as stop_if_interrupted:

        def heard(stage: str, done: int, total: int) -> None:
            stop_if_interrupted()
            progress(stage, done, total)

        report = run_conformance(
            bundle,
            plan,
            build=_builder(bundle, provider, heard),
            open_rounded=_rounding(),
            progress=heard,
        )
    _print(report)
    report.save(file)
    say_written(file)
    if not report.passed:
        raise typer.Exit(1)


def _builder(bundle: Path, provider: str, progress: Progress) -> Build:
    def build(library: Path | None, replace: bool) -> None:
        from zreward.export.tensorrt import EngineOptions, build_engine

        build_engine(bundle, EngineOptions(flavour=provider, plugins=library, force=replace), progress)

    return build


def _rounding() -> OpenRounded | None:
    """What opens graphs in bfloat16 on the CPU, where the packages of the export are installed."""
    try:
        from zreward.export.bfloat16 import open_rounded
    except ImportError:
        return None
    return open_rounded


def _print(report: ConformanceReport) -> None:
    from zreward.runtime.conformance import tables

    out = console.stdout()
    console.print_facts(tables.facts(report))
    for variant in report.variants:
        console.print_table(
            tables.CHECK_COLUMNS, tables.check_rows(variant), title=tables.variant_title(variant)
        )
        for remark in tables.remarks(variant):
            out.print(remark, markup=False)
        _print_times(variant)
    for note in report.notes:
        out.print(note, markup=False)
    out.print(tables.verdict(report), markup=False, style="bold")


def _print_times(variant: VariantReport) -> None:
    from zreward.runtime.conformance import tables

    if variant.times is not None:
        title = tables.time_title(variant, variant.times)
        console.print_table(tables.TIME_COLUMNS, tables.time_rows(variant.times), title=title)
