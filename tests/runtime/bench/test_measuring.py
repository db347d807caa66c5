"""The parts of zreward.runtime.bench that measure: the machine, its rate, repetitions, processes of their own."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from tests.support.bench import RATE
from zreward.bundle import Bundle, write_manifest
from zreward.errors import BackendError, BundleError
from zreward.runtime import Scorer
from zreward.runtime.bench import machine, rates, run_bench, stages, worker
from zreward.runtime.bench import measure as measuring
from zreward.runtime.bench.machine import describe_machine, peak_memory_bytes, restart_peak_memory
from zreward.runtime.bench.measure import measure
from zreward.runtime.bench.plan import BenchPlan
from zreward.runtime.bench.rates import kernels_run, measure_rate
from zreward.runtime.kernels import DISABLE

QUICK = BenchPlan(image_sizes=(48,), candidates=(1, 3), threads=(1,), min_seconds=0, starts=2)


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert found.cpu_count == os.cpu_count()
    assert 1 <= found.usable_cpus <= (found.cpu_count or 1)
    assert found.processor and found.system
    assert found.memory_bytes is None or found.memory_bytes > 2**28


def test_graphics_processors_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'A card, 570.1, 81559 MiB'\necho 'nonsense'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert describe_machine().gpus == (machine.Gpu("A card", "570.1", "81559 MiB"),)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert describe_machine().gpus == ()


def test_the_peak_of_memory_begins_anew() -> None:
    if not restart_peak_memory():
        pytest.skip("only Linux restarts it")
    before = peak_memory_bytes()
    block = np.ones(8_000_000)
    held = peak_memory_bytes()
    del block
    assert held >= before + 60_000_000
    restart_peak_memory()
    assert peak_memory_bytes() <= held - 50_000_000


def test_the_rate_of_two_threads_is_above_that_of_a_product() -> None:
    one = measure_rate(1)
    assert one.threads == 1
    assert one.float_gops > 1
    if kernels_run():
        assert one.method == "registers"
        assert one.integer_gops is not None and one.integer_gops > 2 * one.float_gops
    assert measure_rate(10**3).threads == machine.usable_cpus()


def test_without_kernels_the_rate_is_that_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "1")
    found = measure_rate(1)
    assert (found.method, found.integer_gops, kernels_run()) == ("numpy", None, False)
    assert found.float_gops > 1


def test_a_library_without_the_functions_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"no library")
    monkeypatch.setattr(rates, "compiled_library", lambda: tmp_path / "library.so")
    assert not kernels_run()


def test_a_repetition_times_every_stage_once(scorer: Scorer) -> None:
    image = stages.picture(48)
    found = stages.durations(scorer, stages.numbered_prompt(1), [image] * 3, separate=True)
    assert list(found) == list(stages.STAGES)
    assert min(found.values()) > 0
    assert found["separate"] > found["same_prompt"]


def test_prompts_differ_and_have_equally_many_tokens(scorer: Scorer) -> None:
    encoder = scorer.engine.encoder
    ids = [encoder.text_prefix_ids(stages.numbered_prompt(n)) for n in (0, 7, 12, 54321)]
    assert len({len(i) for i in ids}) == 1
    assert len({i.tobytes() for i in ids}) == 4


def test_as_many_samples_as_asked_for(scorer: Scorer) -> None:
    said: list[tuple[str, int, int]] = []
    found = measure(scorer, QUICK, RATE, lambda *progress: said.append(progress))
    assert [r.configuration.candidates for r in found] == [1, 3]
    assert [r.repetitions for r in found] == [10, 10]
    assert said[-1] == ("48×48, 3 candidates, 1 thread, auto", 100, 100)
    assert [done for _, done, _ in said[:12]] == sorted(done for _, done, _ in said[:12])
    for result in found:
        for name, timing in result.stages.items():
            assert (timing.bound_ms is None) == (name == "decode")
            assert timing.share is None or timing.share > 0


def test_repetitions_go_on_until_the_time_is_over(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    def durations(*_: object, **__: object) -> dict[str, float]:
        clock[0] += 0.25
        return dict.fromkeys(stages.STAGES, 0.25)

    monkeypatch.setattr(measuring, "durations", durations)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    for min_seconds, repetitions in ((0, 10), (2.5, 10), (2.6, 11), (4, 16)):
        found = measure(scorer, BenchPlan((48,), threads=(1,), min_seconds=min_seconds))[0]
        assert found.repetitions == len(found.stages["vision"].samples_ms) == repetitions
        assert found.stages["vision"].bound_ms is None  # no rate was given


def test_the_whole_in_processes_of_their_own(tiny_bundle: Path) -> None:
    found = run_bench(tiny_bundle, QUICK)
    assert len(found.sessions[0].starts) == 2
    start = found.sessions[0].starts[0]
    assert start.total_s == pytest.approx(start.import_s + start.open_s + start.first_score_s, abs=0.01)
    assert found.sessions[0].peak_memory_bytes > 20_000_000
    assert found.bundle.sha256 == Bundle.open(tiny_bundle).sha256
    assert found.sessions[0].kernels == kernels_run()


def test_what_was_measured_is_said(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    older = {**opened.manifest.to_dict(), "work": None}
    older.pop("schema")
    older.pop("version")
    write_manifest(
        bundle_copy,
        type(opened.manifest).from_dict({"schema": "zreward.bundle", "version": 1, **older}, "here"),
    )
    threads = machine.usable_cpus() + 1
    found = run_bench(bundle_copy, BenchPlan((2048,), threads=(threads,), min_seconds=0, starts=1))
    result = found.results[0]
    assert result.height < 2048
    notes = " ".join(found.notes)
    assert f"2048×2048 are resized to {result.width}×{result.height}" in notes
    assert f"There are {threads} threads" in notes
    assert "There is no bound" in notes
    assert all(timing.bound_ms is None for timing in result.stages.values())


def test_errors_of_the_child_are_errors_here(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = lambda *progress: None  # noqa: E731
    (bundle_copy / "contract.json").unlink()
    with pytest.raises(BundleError, match=r"contract\.json"):
        worker.measure_in_child(bundle_copy, QUICK, RATE, silent, only_start=True)
    monkeypatch.setattr("zreward.child.sys.executable", "/bin/false")
    with pytest.raises(BackendError, match="the process that measures ended with status 1"):
        worker.measure_in_child(bundle_copy, QUICK, RATE, silent, only_start=True)
