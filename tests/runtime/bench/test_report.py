"""zreward.runtime.bench.report: files come back as they were, and altered ones are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.support.bench import report, timing
from zreward.errors import BenchError
from zreward.runtime.bench import machine, plan, rates
from zreward.runtime.bench import report as report_module
from zreward.runtime.bench.bound import Operations
from zreward.runtime.bench.report import BenchReport, Timing
from zreward.runtime.bench.stages import STAGES, Tokens

Json = dict[str, Any]

SCHEMA: Json = json.loads(
    (resources.files("zreward") / "assets" / "schemas" / "bench.schema.json").read_text("utf-8")
)


def data() -> Json:
    found: Json = json.loads(json.dumps(report((120, 240), separate=True).to_dict()))
    return found


def accepts(value: Json) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(value))


def test_the_figures_are_those_of_numpy() -> None:
    samples = np.random.default_rng(0).exponential(5, 37) + 1
    found = Timing.of(samples)
    assert found.median_ms == pytest.approx(np.median(samples))
    assert found.p99_ms == pytest.approx(np.percentile(samples, 99))
    assert (found.min_ms, found.max_ms) == pytest.approx((samples.min(), samples.max()))
    assert found.iqr_ms == pytest.approx(np.percentile(samples, 75) - np.percentile(samples, 25))
    assert found.quartiles == pytest.approx(np.percentile(samples, (25, 75)))
    assert found.share is None
    assert dataclasses.replace(found, bound_ms=found.median_ms / 4).share == pytest.approx(0.25)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = report((120, 240), (1, 4), (1, 2), separate=True, notes=("a note",))
    whole.save(tmp_path / "bench.json")
    assert BenchReport.load(tmp_path / "bench.json") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]
    assert accepts(json.loads((tmp_path / "bench.json").read_text()))


def test_throughput_is_that_of_the_medians() -> None:
    found = report(candidates=(4,)).results[0]
    stages = found.stages
    assert found.scores_per_s["same_prompt"] == pytest.approx(4000 / stages["same_prompt"].median_ms)
    seen = stages["decode"].median_ms + stages["vision"].median_ms
    assert found.images_per_s == pytest.approx(4000 / seen)


def change(*place: str | int, to: object) -> Callable[[Json], None]:
    def apply(value: Any) -> None:
        for key in place[:-1]:
            value = value[key]
        value[place[-1]] = to

    return apply


def drop(*place: str | int) -> Callable[[Json], None]:
    def apply(value: Any) -> None:
        for key in place[:-1]:
            value = value[key]
        del value[place[-1]]

    return apply


STAGE = ("results", 0, "stages", "vision")
BROKEN = [
    (change("schema", to="zreward.drift"), "not a report of `zreward bench`"),
    (change("version", to=1), "version 1 is not supported; .* run `zreward bench` again"),
    (change("version", to="2"), "not supported"),
    (change("colour", to=1), "unknown field 'colour'"),
    (change("results", to=[]), "there are no results"),
    (drop("results"), "'results' is missing"),
    (drop("machine", "processor"), "'processor' is missing"),
    (drop("results", 0, "stages", "vision"), "stages must be"),
    (change("results", 0, "stages", "lunch", to=data()["results"][0]["stages"]["vision"]), "stages must be"),
    (change(*STAGE, "samples_ms", to=[]), "no samples"),
    (change(*STAGE, "samples_ms", 0, to=-1.0), "no duration"),
    (change(*STAGE, "samples_ms", 0, to=0.0), "no duration"),
    (change(*STAGE, "samples_ms", 0, to="fast"), "expected a number"),
    (change(*STAGE, "samples_ms", 0, to=1e6), "its samples give"),
    (change(*STAGE, "median_ms", to=0.001), "its samples give .* altered"),
    (change("results", 0, "images_per_s", to=1e9), "do not follow from the samples"),
    (drop("results", 0, "scores_per_s", "new_prompt"), "do not follow from the samples"),
    (change("sessions", 0, "starts", to=[]), "no starts"),
    (change("sessions", to=[]), "belongs to no session"),
    (change("sessions", 0, "rate", "float_gops", to=0.0), "rate must be positive"),
    (change("plan", "repetitions", to=1), "1 repetitions are too few"),
    (change("results", 0, "configuration", "image_size", to=240), "more than once"),
]


@pytest.mark.parametrize(("alter", "message"), BROKEN)
def test_altered_reports_are_refused(alter: Callable[[Json], None], message: str) -> None:
    value = copy.deepcopy(data())
    alter(value)
    with pytest.raises(BenchError, match=f"here.*{message}"):
        BenchReport.from_dict(value, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"schema": NaN}', "NaN is not a JSON number"),
        ('{"schema": "zreward.bench", "version": 2}', "is missing"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(BenchError, match=message):
        BenchReport.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BenchError, match="cannot be read"):
            BenchReport.load(path)


def test_stages_must_have_equally_many_samples() -> None:
    one = report().results[0]
    with pytest.raises(BenchError, match="different numbers of samples"):
        dataclasses.replace(one, stages={**one.stages, "decode": timing(1.0, n=12)})


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("bundle", report_module.BundleFacts),
        ("machine", machine.Machine),
        ("gpu", machine.Gpu),
        ("plan", plan.BenchPlan),
        ("configuration", plan.Configuration),
        ("rate", rates.Rate),
        ("start", report_module.Start),
        ("session", report_module.Session),
        ("tokens", Tokens),
        ("operations", Operations),
        ("timing", Timing),
        ("result", report_module.Result),
    ],
)
def test_the_schema_has_the_fields_of_the_dataclasses(name: str, cls: Any) -> None:
    node, fields, missing = SCHEMA["$defs"][name], dataclasses.fields(cls), dataclasses.MISSING
    assert set(node["properties"]) == {f.name for f in fields}
    assert set(node["required"]) == {f.name for f in fields if f.default is missing}


def test_the_schema_is_one_and_describes_every_property() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["$defs"]["stages"]["properties"]) == set(STAGES)
    assert set(SCHEMA["properties"]) == {"schema", "version"} | {
        f.name for f in dataclasses.fields(BenchReport)
    }
    for node in (SCHEMA, *SCHEMA["$defs"].values()):
        if "properties" in node:
            assert node["additionalProperties"] is False
            assert all(inner.get("description") for inner in node["properties"].values())
    assert accepts(data())
    for alter, _ in BROKEN[:4]:
        value = data()
        alter(value)
        assert not accepts(value)
