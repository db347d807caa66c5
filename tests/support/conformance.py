"""Reports of `zreward conformance` against their schema, and providers that do something wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jsonschema

from zreward.runtime.backends import Session
from zreward.runtime.conformance import ConformanceReport
from zreward.runtime.conformance.checks import FAIL
from zreward.runtime.conformance.roofline import DeviceLimits, Limit

Json = dict[str, Any]

SCHEMA: Json = json.loads(
    (resources.files("zreward") / "assets" / "schemas" / "conformance.schema.json").read_text("utf-8")
)

LIMITS = DeviceLimits(
    "a device",
    {kind: Limit(1e12, "given") for kind in ("int8", "bits16", "tf32", "float32")},
    Limit(1e9, "given"),
    None,
    cache_bytes=1000,
)

Change = Callable[[list[str], Json, list[Any]], list[Any]]


def checked_json(report: ConformanceReport) -> Json:
    """The JSON of a report: strict, and as the schema says."""
    data: Json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    return data


def failures(report: ConformanceReport, number: int = 0) -> dict[str, str]:
    """Details of the checks of a variant that failed, by name."""
    return {check.name: check.detail for check in report.variants[number].checks if check.verdict == FAIL}


class Faulty:
    """A session that runs another one, and changes what it gives."""

    def __init__(self, session: Session, change: Change) -> None:
        self._session, self._change, self.inputs = session, change, session.inputs

    def run(self, outputs: list[str], inputs: Json) -> list[Any]:
        return self._change(outputs, inputs, self._session.run(outputs, inputs))
