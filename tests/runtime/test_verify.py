"""Verification: a good bundle passes, and an altered one fails even where its manifest agrees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import zreward.runtime.verify as verify_module
from tests.support.bundles import accept_changes, change_golden, scramble
from zreward.bundle import Bundle
from zreward.errors import BackendError, BundleError, UsageError
from zreward.runtime.verify import verify_bundle


def test_a_good_bundle_passes(tiny_bundle: Path) -> None:
    report = verify_bundle(tiny_bundle)
    assert report.n_golden == 4 and report.n_files == len(Bundle.open(tiny_bundle).manifest.files)
    assert report.max_probability_difference <= 1e-5 < report.tolerance


def test_a_bundle_is_opened_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_bundle = [], Bundle.open
    monkeypatch.setattr(
        Bundle, "open", staticmethod(lambda path: (opened.append(path), open_bundle(path))[1])
    )
    verify_bundle(tiny_bundle)
    assert opened == [tiny_bundle]


def test_one_flipped_bit_in_any_file_is_found(bundle_copy: Path) -> None:
    for name in Bundle.open(bundle_copy).manifest.files:
        file = bundle_copy / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(BundleError, match="altered"):
            verify_bundle(bundle_copy)
        file.write_bytes(original)
    verify_bundle(bundle_copy)


def test_large_files_are_hashed_too(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening hashes small files alone; verification must not rely on it."""
    monkeypatch.setattr("zreward.bundle._HASH_ON_OPEN_BYTES", 0)
    seen = []
    monkeypatch.setattr(
        verify_module, "check_files", lambda bundle: seen.append(sorted(bundle.manifest.files))
    )
    verify_bundle(tiny_bundle)
    assert seen == [sorted(Bundle.open(tiny_bundle).manifest.files)]


@pytest.mark.parametrize("name", ["vision.onnx.data", "decoder.onnx.data", "embedding.bin"])
def test_altered_weights_with_matching_hashes_fail_the_replay(bundle_copy: Path, name: str) -> None:
    bundle = Bundle.open(bundle_copy)
    scramble(bundle_copy / name)
    accept_changes(bundle)
    with pytest.raises(
        (BundleError, BackendError), match=r"replayed golden scores differ|no usable distribution"
    ):
        verify_bundle(bundle_copy)


def test_altered_golden_scores_with_matching_hashes_fail_the_replay(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    change_golden(bundle, 0.01)
    accept_changes(bundle)
    with pytest.raises(BundleError, match=r"differ by 1\.00e-02 .* more than the 2e-03"):
        verify_bundle(bundle_copy)


def test_a_change_within_the_tolerance_passes(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    change_golden(bundle, 0.001)
    accept_changes(bundle)
    assert verify_bundle(bundle_copy).max_probability_difference == pytest.approx(0.001, abs=1e-5)


def test_a_missing_golden_dimension_is_refused(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    path = bundle_copy / bundle.manifest.golden.file
    data = json.loads(path.read_text())
    data["items"][0]["probs"].pop("realism")
    path.write_text(json.dumps(data))
    accept_changes(bundle)
    with pytest.raises(BundleError, match="are not the contract's"):
        verify_bundle(bundle_copy)


def test_no_golden_items_prove_nothing(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / bundle.manifest.golden.file).write_text('{"items": []}')
    accept_changes(bundle)
    with pytest.raises(BundleError, match="at least one golden item"):
        verify_bundle(bundle_copy)


def test_bad_arguments(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads"):
        verify_bundle(tiny_bundle, threads=0)
    with pytest.raises(BundleError, match="not a bundle"):
        verify_bundle(tmp_path)


def test_weights_of_nan_are_an_error(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    file = bundle_copy / "embedding.bin"
    np.full(file.stat().st_size // 4, np.nan, dtype=np.float32).tofile(file)
    accept_changes(bundle)
    with pytest.raises(BackendError, match="no usable distribution"):
        verify_bundle(bundle_copy)
