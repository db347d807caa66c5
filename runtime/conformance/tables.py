"""The report for people: facts, a table of checks for each variant, and one of times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from zreward.runtime.bench.tables import milliseconds, share
from zreward.runtime.conformance.checks import FAIL, PASS, SKIPPED, Check
from zreward.runtime.conformance.report import ConformanceReport, VariantReport
from zreward.runtime.conformance.roofline import Bound
from zreward.runtime.conformance.timing import Times

CHECK_COLUMNS = ("check", "found", "allowed", "result")
TIME_COLUMNS = ("milliseconds", "median", "IQR", "bound", "share", "bound by")

_VERDICTS = {PASS: "PASS", FAIL: "FAIL", SKIPPED: "left out"}
_NONE = "–"


def facts(report: ConformanceReport) -> dict[str, str]:
    """What was examined, on what, and what it was compared with."""
    bundle, limits = report.bundle, report.limits
    scheme = f"{bundle.quantization}, {bundle.weights}" if bundle.quantization else bundle.weights
    versions = [f"{name} {found}" for name, found in report.versions.items()]
    found = {
        "bundle": f"{bundle.name}, for {bundle.target}, {scheme}, {bundle.parameters / 1e6:,.1f} M parameters",
        "provider": report.provider,
        "device": limits.device,
        "reference": report.reference.what,
        "versions": ", ".join(versions),
        "limits": "; ".join(_limits(report)) or "not known",
    }
    if report.reference.golden_difference is not None:
        found["reference"] += (
            f"; {report.reference.golden_difference:.1e} from the golden scores in a bin probability"
        )
    return found


def variant_title(variant: VariantReport) -> str:
    """What a table of checks is about, in one line."""
    return f"{variant.title}: {variant.details}" if variant.details else variant.title


def check_rows(variant: VariantReport) -> Iterator[tuple[str, ...]]:
    """A row for each check."""
    for check in variant.checks:
        yield (
            check.title,
            _figure(check, check.found),
            _figure(check, check.allowed),
            _VERDICTS[check.verdict],
        )


def remarks(variant: VariantReport) -> Iterator[str]:
    """What a verdict alone does not say: why a check failed or was left out, then what some of the others saw."""
    told = ("plugin_layers", "shapes", "refusal")
    for kind in (FAIL, SKIPPED, PASS):
        for check in variant.checks:
            if check.verdict == kind and (kind != PASS or check.name in told):
                prefix = "" if kind == PASS else f"{_VERDICTS[kind]}: "
                yield f"{prefix}{check.title}: {check.detail or 'more than is allowed'}"


def time_title(variant: VariantReport, times: Times) -> str:
    tokens = times.tokens
    return (
        f"{variant.title}: one image of {times.image_side}×{times.image_side}\n"
        f"{tokens.image - 1:,} image tokens after {tokens.system + tokens.prompt:,} of text"
    )


def time_rows(times: Times) -> Iterator[tuple[str, ...]]:
    """A row for each stage."""
    for stage in times.stages:
        bound = stage.bound
        yield (
            stage.title,
            milliseconds(stage.median_ms),
            milliseconds(stage.iqr_ms),
            _NONE if bound is None or bound.bound_ms is None else milliseconds(bound.bound_ms),
            share(stage.share),
            _bound_by(bound),
        )


def verdict(report: ConformanceReport) -> str:
    """The outcome in one line."""
    counted = Counter(check.verdict for check in report.checks)
    left_out = f", {counted[SKIPPED]} left out" if counted[SKIPPED] else ""
    if report.passed:
        return f"PASS: {report.provider} conforms; {counted[PASS]} checks passed{left_out}"
    return f"FAIL: {counted[FAIL]} of {counted[FAIL] + counted[PASS]} checks failed{left_out}"


def _figure(check: Check, value: float | None) -> str:
    if value is None:
        return _NONE
    if check.name == "memory":
        return f"{value:,.1f}"
    return f"{value:,.0f}" if check.name == "shapes" else f"{value:.1e}"


def _bound_by(bound: Bound | None) -> str:
    if bound is None or bound.bound_ms is None:
        return _NONE
    return "memory" if bound.bound_ms != bound.products_ms else "products"


def _limits(report: ConformanceReport) -> Iterator[str]:
    limits = report.limits
    shown: Mapping[str, str] = {"int8": "int8", "bits16": "16 bits", "float32": "float32"}
    rates = [
        f"{limits.products[kind].per_second / 1e9:,.0f} in {name}"
        for kind, name in shown.items()
        if kind in limits.products
    ]
    if rates:
        source = next(iter(limits.products.values())).source.partition(";")[0]
        yield f"thousand million operations a second: {', '.join(rates)} ({source})"
    if limits.bandwidth is not None:
        yield f"{limits.bandwidth.per_second / 1e9:,.4g} GB/s ({limits.bandwidth.source})"
    if limits.copied is not None and limits.copied != limits.bandwidth:
        yield f"{limits.copied.per_second / 1e9:,.4g} GB/s ({limits.copied.source})"
