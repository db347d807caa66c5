"""What `zreward conformance` finds of a provider that is right, and of providers that are wrong in one way each."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.bundles import accept_changes
from tests.support.conformance import LIMITS, Change, Faulty, checked_json, failures
from zreward.bundle import Bundle
from zreward.errors import BackendError, BundleError
from zreward.runtime.backends import OpenGraphs, Session, open_graphs
from zreward.runtime.conformance import (
    ConformancePlan,
    ConformanceReport,
    reference,
    run,
    shapes,
    timing,
    variants,
)
from zreward.runtime.conformance import run_conformance as run_it
from zreward.runtime.conformance.checks import PASS, SKIPPED
from zreward.runtime.conformance.run import expected_of
from zreward.runtime.conformance.stages import COMPARED

PLAN = ConformancePlan("cpu", cycles=2, repetitions=1, threads=1)

Examine = Callable[..., ConformanceReport]


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> reference.Expected:
    """What the reference gives, computed once."""
    bundle = Bundle.open(tiny_bundle)
    return expected_of(bundle, PLAN, bundle.golden_items(), None)


@pytest.fixture
def examine(
    tiny_bundle: Path, expected: reference.Expected, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Examine]:
    """Examines the provider cpu, with changes to what its graphs give, by their names; without any, in all sizes."""
    monkeypatch.setattr(run, "expected_of", lambda *_: expected)
    monkeypatch.setattr(run, "limits_of_cpu", lambda *_: LIMITS)
    monkeypatch.setattr(timing, "WARM_UP", 0)

    every = shapes.shapes_of

    def examined(**changes: Change) -> ConformanceReport:
        def opened(*arguments: Any, **keywords: Any) -> OpenGraphs:
            found = open_graphs(*arguments, **keywords)
            wrapped = {n: Faulty(s, changes[n]) if n in changes else s for n, s in found.sessions.items()}
            return OpenGraphs(found.provider, found.details, wrapped)

        monkeypatch.setattr(variants, "open_graphs", opened)
        if changes:
            monkeypatch.setattr(shapes, "shapes_of", lambda *given: [every(*given)[0], *every(*given)[-3:]])
        return run_it(tiny_bundle, PLAN, build=_never)

    return examined


def _never(*_: object) -> None:
    raise AssertionError("the provider cpu has no engines")


def test_a_provider_that_is_right(examine: Examine, tiny_bundle: Path) -> None:
    report = examine()
    assert report.passed, failures(report)
    data = checked_json(report)
    (variant,) = data["variants"]
    verdicts = {check["name"]: check["verdict"] for check in variant["checks"]}
    assert verdicts.pop("plugin_layers") == SKIPPED and set(verdicts.values()) == {PASS}
    assert len(verdicts) == 14 and "examined once" in variant["once"]
    # Another way of summing is not the same way: the reference is no copy of the provider.
    states = {(s["state"], s["after"]): s["relative_l2"] for s in variant["states"]}
    assert len(states) == 2 * len(Bundle.open(tiny_bundle).manifest.states)
    assert max(states.values()) > 0
    assert [shape["runs"] for shape in variant["shapes"]] == [2] * 10
    assert len(variant["memory"]["used_bytes"]) == 2
    stages = {stage["stage"]: stage for stage in variant["times"]["stages"]}
    for stage in stages.values():
        assert len(stage["samples_ms"]) == 1
    parts = ("vision", "system_text", "prompt", "image_prefix", "questions")
    bounds = [stages[part]["bound"]["bound_ms"] for part in parts]
    assert stages["nothing_kept"]["bound"]["bound_ms"] == pytest.approx(sum(bounds))
    assert data["reference"]["golden_difference"] < 1e-5 and "no packed weights" in data["reference"]["what"]
    assert str(tiny_bundle.parent) not in str(data)


def _as_it_is(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
    return results


def _nan(name: str) -> Change:
    def change(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
        return [np.full_like(r, np.nan) if n == name else r for n, r in zip(outputs, results, strict=True)]

    return change


def _scaled(ending: str, factor: float) -> Change:
    def change(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
        return [
            r * r.dtype.type(factor) if n.endswith(ending) else r
            for n, r in zip(outputs, results, strict=True)
        ]

    return change


def _moved(results: list[Any], amount: float) -> list[Any]:
    """Probabilities with so much moved from the first bin to the second."""
    probs = results[0].copy()
    probs[:, 0] -= amount
    probs[:, 1] += amount
    return [probs, *results[1:]]


def _depends_on_the_batch(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
    return _moved(results, 0.004) if outputs[0] == "probs" and len(results[0]) == 1 else results


def _mixes_rows(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
    return [r[::-1] for r in results] if outputs[0] == "probs" else results


def _alternates() -> Change:
    """Two answers in turn, for the smallest size."""
    calls = iter(range(10_000))

    def change(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
        smallest = inputs["inputs_embeds"].shape[0] == 1 and inputs["past_key_values.3.key"].shape[2] == 1
        return _moved(results, 0.01 * (next(calls) % 2)) if outputs[0] == "probs" and smallest else results

    return change


def _breaks_at_one_token(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
    if inputs["inputs_embeds"].shape[1] == 1:
        raise RuntimeError("a kernel for\none token is missing")
    return results


@pytest.mark.parametrize(
    ("graph", "change", "failed", "said"),
    [
        ("vision", _scaled("image_features", 1.01), {"vision_features", "states_after_image"}, "key"),
        ("vision", _nan("image_features"), {"vision_features", "shapes", "golden", "times"}, "NaN"),
        ("decoder", _scaled("recurrent_state", 1.01), {"states_after_prompt"}, "recurrent_state"),
        (
            "decoder",
            _nan("probs"),
            {"golden", "probabilities", "shapes", "batches", "refusal", "times"},
            "NaN",
        ),
        ("decoder", _mixes_rows, {"golden", "probabilities", "mean", "variance", "scores", "batches"}, ""),
    ],
)
def test_what_is_wrong_is_found(
    examine: Examine, graph: str, change: Change, failed: set[str], said: str
) -> None:
    report = examine(**{graph: change})
    found = failures(report)
    assert not report.passed and failed <= set(found), found
    assert said in " ".join(found.values()), found
    data = checked_json(report)
    assert data["passed"] is data["variants"][0]["passed"] is False


def test_every_fault_is_one_failed_check(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six at once, which have nothing to do with each other."""
    changes = (_nan("variance"), _depends_on_the_batch, _alternates(), _breaks_at_one_token)

    def decoder(outputs: list[str], inputs: Any, results: list[Any]) -> list[Any]:
        for change in changes:
            results = change(outputs, inputs, results)
        return results

    used = iter([500_000_000, 560_000_000])
    monkeypatch.setattr(run, "resident_bytes", lambda: next(used))
    monkeypatch.setattr(Faulty, "run", _taking_any_width(Faulty.run))
    report = examine(vision=_as_it_is, decoder=decoder)
    found = failures(report)
    assert found.keys() == {"variance", "batches", "repeats", "shapes", "refusal", "memory"}, found
    assert found["variance"] == "it is nan, which is no number"
    assert found["repeats"] == "1 question after 1 token"
    assert "text, 1 token: RuntimeError: a kernel for one token is missing" in found["shapes"]
    assert found["refusal"] == "not refused: patches of one value too many"
    (memory,) = [check for check in report.checks if check.name == "memory"]
    assert (memory.found, memory.allowed) == (60.0, 50.0), "a tenth of what is in use"
    checked_json(report)


def _taking_any_width(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def run(session: Faulty, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        pixels = inputs.get("pixel_values")
        if pixels is not None:
            inputs = {**inputs, "pixel_values": pixels[:, : pixels.shape[1] // 8 * 8]}
        return original(session, outputs, inputs)

    return run


def test_graphs_in_bfloat16_have_the_golden_scores_alone_or_a_copy_that_rounds(
    tiny_bundle: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    bundle = dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, target="tensorrt", weights="bf16")
    )
    items = bundle.golden_items()[:1]
    opened: list[str] = []

    def rounded(path: Path, open_graph: Callable[[Path], Session]) -> Session:
        opened.append(path.name)
        return open_graph(path)

    def closed(path: Path, open_graph: Callable[[Path], Session]) -> Session:
        raise OSError(errno.EROFS, "Read-only file system")

    found = expected_of(bundle, PLAN, items, rounded)
    assert opened == ["vision.onnx", "decoder.onnx"] and len(found.observed) == 1
    assert "rounded to bfloat16" in found.record.what
    unwritten = expected_of(bundle, PLAN, items, closed)
    assert "cannot be written to (Read-only file system)" in unwritten.record.missing
    alone = expected_of(bundle, PLAN, bundle.golden_items(), None)
    assert not alone.observed and "zreward[export]" in alone.record.missing
    monkeypatch.setattr(run, "expected_of", lambda *_: alone)
    report = examine(decoder=_as_it_is)
    skipped = {check.name for check in report.checks if check.verdict == SKIPPED}
    assert report.passed and skipped == {"plugin_layers", *COMPARED}
    checked_json(report)


def test_a_reference_that_is_off_and_memory_that_nobody_tells(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: reference.Expected = run.expected_of()  # type: ignore[call-arg]  # the fixture's, computed once
    off = dataclasses.replace(expected, record=dataclasses.replace(expected.record, golden_difference=0.1))
    monkeypatch.setattr(run, "expected_of", lambda *_: off)
    monkeypatch.setattr(run, "resident_bytes", lambda: None)
    report = examine(decoder=_as_it_is)
    assert any(note.startswith("The reference itself") for note in report.notes)
    assert report.passed and report.variants[0].memory is None
    assert checked_json(report)["variants"][0]["memory"] is None


def test_what_cannot_be_examined_at_all(
    tiny_bundle: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> OpenGraphs:
        raise BackendError("no such luck")

    monkeypatch.setattr(run, "limits_of_cpu", lambda *_: LIMITS)
    with monkeypatch.context() as patch, pytest.raises(BackendError, match="no such luck"):
        patch.setattr(variants, "open_graphs", opened)
        run_it(tiny_bundle, PLAN, build=_never)
    with monkeypatch.context() as patch, pytest.raises(BackendError, match=r"pip install 'zreward\[cpu\]'"):
        patch.setattr(reference, "find_spec", lambda name: None)
        run_it(tiny_bundle, PLAN, build=_never)
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / bundle.manifest.golden.file).write_text('{"items": []}')
    accept_changes(bundle)
    with pytest.raises(BundleError, match="at least one golden item"):
        run_it(bundle_copy, PLAN, build=_never)
