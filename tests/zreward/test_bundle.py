"""zreward.bundle: a real bundle opens, and every damaged, altered or malicious one is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from tests.support.models import small_contract, write_checkpoint
from zreward import bundle as bundle_module
from zreward.bundle import (
    Bundle,
    EmbeddingInfo,
    FileEntry,
    Manifest,
    StateInfo,
    check_files,
    file_entries,
    write_manifest,
)
from zreward.contract import ScoreContract
from zreward.errors import BundleError, ZrewardError
from zreward.export import ExportOptions, export_bundle
from zreward.runtime.verify import verify_bundle

Json = dict[str, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = write_checkpoint(folder / "checkpoint")
    export_bundle(checkpoint, folder / "bundle", ExportOptions(parity=False))
    return folder / "bundle"


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def edit_manifest(path: Path, edit: Callable[[Json], object]) -> None:
    data = json.loads((path / "manifest.json").read_text())
    edit(data)
    (path / "manifest.json").write_text(json.dumps(data))


def relist(path: Path, *names: str) -> None:
    """Give the manifest the present size and hash of `names`, as someone who hides a change would."""

    def edit(data: Json) -> None:
        for name in names:
            content = (path / name).read_bytes()
            entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            data["files"][name] = entry

    edit_manifest(path, edit)


def set_location(path: Path, graph: str, location: str) -> None:
    """Point the first external tensor of a graph elsewhere, and make the manifest agree."""
    model = onnx.load(path / graph, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    next(e for e in tensor.external_data if e.key == "location").value = location
    (path / graph).write_bytes(model.SerializeToString())
    relist(path, graph)


def edit_golden(path: Path, edit: Callable[[Json], object]) -> None:
    data = json.loads((path / "golden.json").read_text())
    edit(data)
    (path / "golden.json").write_text(json.dumps(data))
    relist(path, "golden.json")


def test_a_real_bundle_opens_and_verifies(original: Path) -> None:
    opened = Bundle.open(original)
    assert opened.contract == small_contract(patch=8)
    assert opened.sha256 == hashlib.sha256((original / "manifest.json").read_bytes()).hexdigest()
    check_files(opened)
    assert Bundle.open(str(original)) == opened
    report = verify_bundle(original, threads=1)
    assert report.n_files == len(opened.manifest.files)
    assert report.n_golden == len(opened.golden_items()) == 4


def test_the_manifest_lists_every_other_file_with_its_hash(original: Path) -> None:
    names = {p.relative_to(original).as_posix() for p in original.rglob("*") if p.is_file()}
    files = Bundle.open(original).manifest.files
    assert set(files) == names - {"manifest.json"}
    for name, entry in files.items():
        content = (original / name).read_bytes()
        assert entry == FileEntry(len(content), hashlib.sha256(content).hexdigest())
    assert file_entries(original) == files


def test_manifest_round_trip(original: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(original).manifest
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (original / "manifest.json").read_bytes()
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())), "here") == manifest


def test_a_copied_moved_or_linked_bundle_is_the_same(bundle: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle)
    bundle.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to("elsewhere")
    for path in (tmp_path / "elsewhere", tmp_path / "link"):
        assert Bundle.open(path).sha256 == before.sha256


def test_what_is_not_a_bundle_is_answered_with_how_to_make_one(tmp_path: Path, original: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", original / "manifest.json"):
        with pytest.raises(BundleError, match=r"not a bundle.*zreward export"):
            Bundle.open(path)


@pytest.mark.parametrize("damage", ["missing", "altered", "cut", "longer", "empty", "a directory"])
def test_every_damaged_file_is_found(original: Path, bundle: Path, damage: str) -> None:
    for name in Bundle.open(original).manifest.files:
        file, content = bundle / name, (bundle / name).read_bytes()
        file.unlink()
        if damage == "a directory":
            file.mkdir()
        elif damage != "missing":
            flipped = bytes([content[0] ^ 1]) + content[1:]
            new = {"altered": flipped, "cut": content[:-1], "longer": content + b"\0", "empty": b""}[damage]
            file.write_bytes(new)
        with pytest.raises(BundleError, match=name.rsplit("/")[-1]):
            Bundle.open(bundle)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    assert Bundle.open(bundle)


def test_large_files_are_hashed_by_verify_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_HASH_ON_OPEN_BYTES", 500_000)
    file = bundle / "decoder.onnx.data"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    opened = Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data.*altered"):
        check_files(opened)
    with pytest.raises(BundleError, match="altered"):
        verify_bundle(bundle)


def test_an_unlisted_file_is_nobodys_business(bundle: Path) -> None:
    (bundle / "README.md").write_text("notes")
    (bundle / "dangling").symlink_to("/nowhere")
    check_files(Bundle.open(bundle))


def test_links_may_not_leave_the_bundle(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("embedding.bin", "golden/0.png", "contract.json"):
        (bundle / name).rename(outside / "moved")
        (bundle / name).symlink_to(outside / "moved")
        with pytest.raises(BundleError, match=f"{name}.*leaves the bundle"):
            Bundle.open(bundle)
        (bundle / name).unlink()
        (outside / "moved").rename(bundle / name)
    (bundle / "golden").rename(outside / "golden")
    (bundle / "golden").symlink_to(outside / "golden")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle)


def test_links_that_go_nowhere_or_round_are_missing_files(bundle: Path) -> None:
    (bundle / "embedding.bin").unlink()
    for target in ("embedding.bin", "nowhere", "/dev/zero"):
        (bundle / "embedding.bin").symlink_to(target)
        with pytest.raises(BundleError, match=r"embedding\.bin"):
            Bundle.open(bundle)
        (bundle / "embedding.bin").unlink()


def test_a_link_within_the_bundle_is_followed(bundle: Path) -> None:
    (bundle / "golden/0.png").rename(bundle / "golden/zero.png")
    (bundle / "golden/0.png").symlink_to("zero.png")
    check_files(Bundle.open(bundle))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(bundle: Path) -> None:
    (bundle / "embedding.bin").chmod(0)
    with pytest.raises(BundleError, match=r"embedding\.bin.*cannot be read"):
        Bundle.open(bundle)


def test_a_disk_that_fails_is_a_bundle_error(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(bundle_module, "file_sha256", fail)
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(original)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "./a",
        ".hidden",
        "a/.b",
        "a\\b",
        "C:\\a",
        "a\0b",
        "a\nb",
        "*/_ORT_MEM_ADDR_/*",
        "ä",
        "a b",
    ],
)
def test_file_names_that_could_leave_the_bundle_are_refused(bundle: Path, name: str) -> None:
    edit_manifest(bundle, lambda data: data["files"].update({name: {"bytes": 1, "sha256": "ab"}}))
    with pytest.raises(BundleError, match="is refused"):
        Bundle.open(bundle)


def test_a_file_name_beyond_what_the_system_takes_is_missing(bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data["files"].update({"x" * 5000: {"bytes": 1, "sha256": "ab"}}))
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(bundle)


@pytest.mark.parametrize("graph", ["vision.onnx", "decoder.onnx"])
@pytest.mark.parametrize(
    "location", ["../outside.data", "/etc/passwd", "golden/../../outside.data", "", "*/_ORT_MEM_ADDR_/*"]
)
def test_graphs_that_read_outside_are_refused(bundle: Path, graph: str, location: str) -> None:
    (bundle.parent / "outside.data").write_bytes(bytes(10**6))
    set_location(bundle, graph, location)
    with pytest.raises(BundleError, match="is refused"):
        Bundle.open(bundle)


def test_graphs_that_read_an_unlisted_file_are_refused(bundle: Path) -> None:
    shutil.copy(bundle / "vision.onnx.data", bundle / "other.data")
    set_location(bundle, "vision.onnx", "other.data")
    with pytest.raises(BundleError, match=r"'other\.data', which is not listed"):
        Bundle.open(bundle)
    relist(bundle, "other.data")
    assert Bundle.open(bundle)


def test_a_graph_that_is_no_graph_is_refused(bundle: Path) -> None:
    (bundle / "vision.onnx").write_bytes(b"\xff" * 40)
    relist(bundle, "vision.onnx")
    with pytest.raises(BundleError, match=r"vision\.onnx: not an ONNX file"):
        Bundle.open(bundle)


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True])
def test_other_versions_are_refused(bundle: Path, version: object) -> None:
    edit_manifest(bundle, lambda data: data.update(version=version))
    with pytest.raises(BundleError, match=r"bundle version .* is not supported.*upgrade zreward"):
        Bundle.open(bundle)


def with_value(*place: str | int, value: object) -> Callable[[Json], None]:
    def edit(data: Json) -> None:
        target: Any = data
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_value("schema", value="zreward.contract"), "not a zreward bundle"),
        (with_value("colour", value=1), "unknown field 'colour'"),
        (with_value("model", "colour", value=1), "unknown field 'colour'"),
        (lambda data: data.pop("states"), "field 'states' is missing"),
        (with_value("states", value=[]), "states are empty"),
        (with_value("states", 0, "dtype", value="object"), "dtype 'object'"),
        (with_value("states", 0, "shape", value=["batch", "layers"]), "'batch', 'state_batch', 'past'"),
        (with_value("states", 0, "shape", value=[0, 3]), "positive integers"),
        (with_value("states", 0, "shape", value=[True]), "expected an integer"),
        (with_value("graphs", value={"vision": "vision.onnx"}), "'vision' and 'decoder'"),
        (with_value("graphs", "decoder", value="other.onnx"), "used but not listed"),
        (with_value("graphs", "decoder", value="embedding.bin"), r"'embedding\.bin' is not named \.onnx"),
        (with_value("golden", "file", value="manifest.json"), "used but not listed"),
        (with_value("golden", "tolerance", value=0), "positive number"),
        (with_value("golden", "tolerance", value=-1), "positive number"),
        (with_value("golden", "tolerance", value="1"), "expected a number"),
        (with_value("golden", "tolerance", value=10**400), "too large"),
        (with_value("embedding", "dtype", value="int8"), "dtype 'int8'"),
        (with_value("embedding", "shape", value=[640]), "expected 2 values"),
        (with_value("embedding", "shape", value=[-640, 64]), "positive"),
        (with_value("embedding", "shape", value=[320, 128]), "do not fit hidden_size 64"),
        (with_value("model", "parameters", value=1.5), "expected an integer"),
        (with_value("label_mass", value=1), "expected true or false"),
        (with_value("files", value=[]), "expected an object"),
        (lambda data: data["files"].pop("contract.json"), r"'contract\.json' is used but not listed"),
        (lambda data: data["files"].pop("tokenizer.json"), "used but not listed"),
        (with_value("files", "embedding.bin", "bytes", value=-1), "should have -1"),
        (with_value("files", "embedding.bin", "sha256", value=None), "expected a string"),
        (with_value("files", "embedding.bin", "sha256", value="ab" * 32), "altered"),
        (with_value("contract_sha256", value="ab" * 32), "not the contract that the manifest"),
        (with_value("parity", value={"max_difference": 0.0}), "is missing"),
        (with_value("quantization", value="int8"), "expected an object"),
    ],
)
def test_malformed_manifests_are_refused(bundle: Path, edit: Callable[[Json], object], message: str) -> None:
    edit_manifest(bundle, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_manifests_that_are_not_strict_json_are_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    text = path.read_text()
    damaged = [
        "", "[]", "null", text[:-10], text + "}",
        text.replace("0.002", "NaN"), text.replace("0.002", "1e999"),
        text.replace('"target"', '"weights": "fp32", "target"', 1),
        text.replace('"fp32"', '"\\ud800"', 1), "[" * 100_000,
    ]  # fmt: skip
    for content in damaged:
        assert content != text
        path.write_text(content)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            Bundle.open(bundle)


def test_another_contract_is_refused_even_if_the_file_list_agrees(bundle: Path) -> None:
    contract = ScoreContract.load(bundle)
    dataclasses.replace(contract, instruction=contract.instruction + " Be kind.").save(bundle)
    relist(bundle, "contract.json")
    with pytest.raises(BundleError, match="not the contract that the manifest was written for"):
        Bundle.open(bundle)


def test_a_damaged_contract_is_a_bundle_error(bundle: Path) -> None:
    (bundle / "contract.json").write_text("{}")
    relist(bundle, "contract.json")
    with pytest.raises(BundleError, match=r"contract\.json: not a score contract"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(items=[]), "at least one golden item"),
        (lambda data: data.update(items={}), "at least one golden item"),
        (lambda data: data.update(colour=1), "'items' alone"),
        (with_value("items", 1, value="text"), r"items\[1\]: expected an object"),
        (with_value("items", 1, "prompt", value=5), "prompt: expected a string"),
        (with_value("items", 1, "colour", value=5), "unknown field"),
        (with_value("items", 1, "image", value="../outside.png"), "not a file of the bundle"),
        (with_value("items", 1, "image", value="/etc/passwd"), "not a file of the bundle"),
        (with_value("items", 1, "probs", value={}), "not the contract's"),
        (with_value("items", 1, "probs", "realism", value=[]), "realism is not a distribution"),
        (with_value("items", 1, "probs", "realism", value=[1.0]), "realism is not a distribution"),
        (with_value("items", 1, "probs", "realism", value=[0.2] * 9), "realism is not a distribution"),
        (with_value("items", 1, "probs", "realism", value=[0.0] * 9), "realism is not a distribution"),
        (with_value("items", 1, "probs", "realism", value=[-0.5, 1.5] + [0.0] * 7), "not a distribution"),
        (with_value("items", 1, "probs", "realism", value=[None] * 9), "expected a number"),
        (with_value("items", 1, "probs", "realism", value=[float("nan")] * 9), "NaN"),
        (with_value("items", 1, "probs", "beauty", value=[1.0] + [0.0] * 8), "not the contract's"),
    ],
)
def test_malformed_golden_inputs_are_refused(
    bundle: Path, edit: Callable[[Json], object], message: str
) -> None:
    edit_golden(bundle, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle).golden_items()
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


def test_other_golden_scores_fail_verification(bundle: Path) -> None:
    edit_golden(bundle, with_value("items", 0, "probs", "realism", value=[1.0] + [0.0] * 8))
    with pytest.raises(BundleError, match="replayed golden scores differ"):
        verify_bundle(bundle, threads=1)


def test_errors_are_zreward_errors_with_the_path_in_them(bundle: Path) -> None:
    (bundle / "vision.onnx").unlink()
    with pytest.raises(ZrewardError, match=str(bundle)):
        Bundle.open(bundle)


@pytest.mark.parametrize("shape", [("batch", 0), ("batch", "time"), (-1,)])
def test_state_shapes_are_checked_when_made(shape: tuple[int | str, ...]) -> None:
    with pytest.raises(BundleError, match="state 'past'"):
        StateInfo("past", "present", "float32", shape)


def test_embedding_types_are_checked_when_made() -> None:
    with pytest.raises(BundleError, match="int8"):
        EmbeddingInfo("embedding.bin", "int8", (4, 4))
