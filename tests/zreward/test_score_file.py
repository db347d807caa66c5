"""What `zreward score` wrote, read for an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zreward.contract import DEFAULT_BINS
from zreward.errors import UsageError
from zreward.evaluation import Labels, read_labels
from zreward.score_file import NO_PROBS, OTHER_BINS, read_score_file

Record = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    """Two lines, labelled in one dimension."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": "p", "image": f"{i}.png", "scores": {"realism": 3.0}}) for i in range(2)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_labels(path)


@pytest.fixture
def records(labels: Labels) -> list[Record]:
    """An answer with a distribution for every line."""
    distributions = np.random.default_rng(0).dirichlet(np.ones(9), 2)
    return [
        {
            "line": number,
            "input": digest,
            "dimensions": {"realism": {"mean": float(probs @ DEFAULT_BINS), "probs": probs.tolist()}},
            "bundle": "0123456789abcdef",
            "contract": "ab" * 32,
        }
        for number, (digest, probs) in enumerate(zip(labels.digests, distributions, strict=True), 1)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: Record | str) -> Path:
        path = tmp_path / "scores.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return path

    return write


def of(record: Record, **changes: Any) -> Record:
    """The record with other contents of its dimension."""
    return {**record, "dimensions": {"realism": {**record["dimensions"]["realism"], **changes}}}


def test_means_distributions_and_where_they_are_from(
    labels: Labels, records: list[Record], write: Write
) -> None:
    found = read_score_file(write(*records), labels)
    expected = [[record["dimensions"]["realism"]["probs"]] for record in records]
    np.testing.assert_array_equal(found.predictions.probs, expected)
    np.testing.assert_allclose(found.predictions.means, np.array(expected) @ DEFAULT_BINS)
    assert found.predictions.bins == DEFAULT_BINS
    assert (found.contract, found.bundle, found.notes) == ("ab" * 32, "0123456789abcdef", ())


def test_a_failed_line_is_nan(labels: Labels, records: list[Record], write: Write) -> None:
    failed = {k: v for k, v in records[1].items() if k != "dimensions"} | {"error": {"type": "ImageError"}}
    found = read_score_file(write(records[0], failed), labels).predictions
    assert np.isfinite(found.means[0]).all()
    assert np.isnan(found.means[1]).all()
    assert found.probs is not None
    assert np.isnan(found.probs[1]).all()


def test_files_of_failed_lines_alone_can_be_read(labels: Labels, records: list[Record], write: Write) -> None:
    failed = [
        {k: v for k, v in record.items() if k != "dimensions"} | {"error": {"type": "ImageError"}}
        for record in records
    ]
    assert np.isnan(read_score_file(write(*failed), labels).predictions.means).all()


def test_older_files_without_probabilities_have_means(
    labels: Labels, records: list[Record], write: Write
) -> None:
    old = [{k: v for k, v in of(r, probs=None).items() if k not in ("bundle", "contract")} for r in records]
    found = read_score_file(write(*old), labels)
    assert np.isfinite(found.predictions.means).all()
    assert found.predictions.probs is None
    assert (found.contract, found.bundle, found.notes) == (None, None, (NO_PROBS,))


def test_bins_are_taken_only_where_they_give_the_means(
    labels: Labels, records: list[Record], write: Write
) -> None:
    shifted = [of(r, mean=r["dimensions"]["realism"]["mean"] + 1e-3) for r in records]
    for other in (shifted, [of(r, mean=0.5, probs=[0.5, 0.5]) for r in records]):
        found = read_score_file(write(*other), labels)
        assert found.predictions.probs is None
        assert found.notes == (OTHER_BINS,)


def test_files_of_another_data_set_are_refused(labels: Labels, records: list[Record], write: Write) -> None:
    first, second = records
    cases: list[tuple[list[Record | str], str]] = [
        ([first], "answers 1 of 2 lines"),
        ([], "answers 0 of 2 lines"),
        ([{**first, "input": "0" * 16}, second], "line 1: answers another data set"),
        ([first, second, second], "line 3: answers another data set"),
        (["no JSON"], "line 1: not a line"),
        ([first, {**second, "bundle": "f" * 16}], "line 2: scored with another bundle"),
        (
            [first, {**second, "dimensions": {"alignment": {"mean": 3.0}}}],
            "line 2: no scores of the labelled",
        ),
        ([first, {**second, "dimensions": [1]}], "line 2: no scores of the labelled"),
    ]
    for lines, message in cases:
        with pytest.raises(UsageError, match=message):
            read_score_file(write(*lines), labels)


def test_what_is_no_distribution_is_refused(labels: Labels, records: list[Record], write: Write) -> None:
    first, second = records
    probs = second["dimensions"]["realism"]["probs"]
    cases: list[tuple[Record | str, str]] = [
        (of(second, mean="3"), "expected a number"),
        (of(second, mean=None), "expected a number"),
        (of(second, mean=True), "expected a number"),
        (of(second, probs="all"), "no list"),
        (of(second, probs=[*probs[:-1], None]), "expected a number"),
        (of(second, probs=[*probs[:-1], -probs[-1]]), "line 2: 'probs' is no distribution"),
        (of(second, probs=[2 * p for p in probs]), "line 2: 'probs' is no distribution"),
        (of(second, probs=probs[:-1]), "over 8 and 9 bins"),
        (json.dumps(of(second, probs=[float("nan")] * 9)), "line 2: not a line .*NaN"),
    ]
    for line, message in cases:
        with pytest.raises(UsageError, match=message):
            read_score_file(write(first, line), labels)
