"""The JSON Schemas of contract and manifest: they describe every field, and refuse what the readers refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.models import write_checkpoint
from zreward.bundle import (
    EmbeddingInfo,
    FileEntry,
    GoldenInfo,
    GraphWork,
    Manifest,
    ModelInfo,
    ParityInfo,
    StateInfo,
    Work,
)
from zreward.contract import ChatTemplate, Dimension, DriftLimits, ScoreContract
from zreward.errors import BundleError, ContractError
from zreward.export import ExportOptions, export_bundle
from zreward.image import ImageSpec

Json = dict[str, Any]
Place = tuple[str | int, ...]


def schema(name: str) -> Json:
    text = (resources.files("zreward") / "assets" / "schemas" / f"{name}.schema.json").read_text("utf-8")
    value: Json = json.loads(text)
    return value


CONTRACT, MANIFEST = schema("contract"), schema("manifest")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The manifest of a real bundle, with parity."""
    folder: Path = tmp_path_factory.mktemp("schemas")
    export_bundle(write_checkpoint(folder / "checkpoint"), folder / "bundle", ExportOptions(parity=True))
    value: Json = json.loads((folder / "bundle" / "manifest.json").read_text())
    return value


@pytest.fixture
def contract() -> Json:
    value: Json = json.loads(json.dumps(ScoreContract.default().to_dict()))
    return value


def accepts(schema_: Json, value: object) -> bool:
    return bool(jsonschema.Draft202012Validator(schema_).is_valid(value))


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """The way to every value inside a JSON value, objects and lists included."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*place, key)
            yield from places(item, (*place, key))


def changed(value: Json, place: Place, new: object) -> Json:
    value = copy.deepcopy(value)
    parent: Any = value
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = new
    return value


@pytest.mark.parametrize("value", [CONTRACT, MANIFEST])
def test_the_schemas_are_schemas_with_a_description_of_every_property(value: Json) -> None:
    jsonschema.Draft202012Validator.check_schema(value)
    for node in (value, *value["$defs"].values(), *value["properties"].values()):
        for name, inner in node.get("properties", {}).items():
            target = value["$defs"][inner["$ref"].rsplit("/")[-1]] if "$ref" in inner else {}
            assert inner.get("description") or target.get("description"), name
        if node.get("type") == "object":
            assert "additionalProperties" in node


@pytest.mark.parametrize(
    ("node", "cls"),
    [
        (CONTRACT, ScoreContract),
        (CONTRACT["$defs"]["dimension"], Dimension),
        (CONTRACT["$defs"]["template"], ChatTemplate),
        (CONTRACT["$defs"]["image"], ImageSpec),
        (CONTRACT["$defs"]["drift"], DriftLimits),
        (MANIFEST, Manifest),
        (MANIFEST["properties"]["model"], ModelInfo),
        (MANIFEST["properties"]["embedding"], EmbeddingInfo),
        (MANIFEST["properties"]["golden"], GoldenInfo),
        (MANIFEST["$defs"]["state"], StateInfo),
        (MANIFEST["$defs"]["file_entry"], FileEntry),
        (MANIFEST["$defs"]["parity"], ParityInfo),
        (MANIFEST["$defs"]["work"], Work),
        (MANIFEST["$defs"]["graph_work"], GraphWork),
    ],
)
def test_the_schemas_have_the_fields_of_the_dataclasses(node: Json, cls: type) -> None:
    stamp = {"schema", "version"} if cls in (ScoreContract, Manifest) else set()
    fields = dataclasses.fields(cls)
    missing = dataclasses.MISSING
    required = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    assert set(node["properties"]) == stamp | {f.name for f in fields}
    assert set(node.get("required", ())) == stamp | required
    assert node["additionalProperties"] is False
    for f in fields:
        if isinstance(f.default, int | float) and "default" in node["properties"][f.name]:
            assert node["properties"][f.name]["default"] == f.default


def test_real_files_are_valid(contract: Json, manifest: Json) -> None:
    jsonschema.Draft202012Validator(CONTRACT).validate(contract)
    jsonschema.Draft202012Validator(MANIFEST).validate(manifest)
    jsonschema.Draft202012Validator(MANIFEST).validate({**manifest, "parity": None, "work": None})
    jsonschema.Draft202012Validator(MANIFEST).validate({k: v for k, v in manifest.items() if k != "work"})
    jsonschema.Draft202012Validator(MANIFEST).validate({**manifest, "quantization": {"rules": []}})
    assert manifest["parity"]["n_images"] == 4


def test_wrong_types_are_refused_by_schema_and_reader_alike(contract: Json, manifest: Json) -> None:
    for schema_, value, read in (
        (CONTRACT, contract, ScoreContract.from_dict),
        (MANIFEST, manifest, lambda data: Manifest.from_dict(data, "here")),
    ):
        for place in places(value):
            for wrong in ([None], {"colour": None}):
                data = changed(value, place, wrong)
                free = place == ("quantization",) and isinstance(wrong, dict)
                assert accepts(schema_, data) == free, (place, wrong)
                if not free:
                    with pytest.raises((ContractError, BundleError)):
                        read(data)


def test_unknown_and_missing_fields_are_refused(contract: Json, manifest: Json) -> None:
    for schema_, value in ((CONTRACT, contract), (MANIFEST, manifest)):
        objects = [(), *(p for p in places(value) if isinstance(_at(value, p), dict))]
        for place in objects:
            if place not in (("versions",), ("files",)):
                assert not accepts(schema_, changed(value, (*place, "colour"), 1)), place
        for name in schema_["required"]:
            assert not accepts(schema_, {k: v for k, v in value.items() if k != name}), name


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("version",), 2),
        (("schema",), "zreward.contract"),
        (("contract_sha256",), "AB" * 32),
        (("files", "contract.json", "sha256"), "ab"),
        (("files", "../outside"), {"bytes": 1, "sha256": "ab" * 32}),
        (("files", "/etc/passwd"), {"bytes": 1, "sha256": "ab" * 32}),
        (("graphs", "decoder"), "../decoder.onnx"),
        (("graphs", "decoder"), "decoder.ort"),
        (("embedding", "shape"), [640, 64, 1]),
        (("states", 0, "shape"), ["batch", "time"]),
        (("golden", "tolerance"), 0),
        (("parity", "n_images"), 0),
        (("work", "vision", "float_per_row"), -1),
    ],
)
def test_what_a_manifest_may_not_say(manifest: Json, place: Place, new: object) -> None:
    assert not accepts(MANIFEST, changed(manifest, place, new))


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("version",), 2),
        (("schema",), "zreward.bundle"),
        (("bins",), [1.0]),
        (("codes", 0), ""),
        (("codes", 0), "2"),
        (("dimensions",), []),
        (("dimensions", 0, "name"), "Photo realism"),
        (("dimensions", 0, "question"), " \n"),
        (("dimensions", 0, "temperature"), 0),
        (("template", "before_image"), "{system}"),
        (("template", "question"), "Score it:"),
        (("image", "std"), [0.5, 0.5, 0]),
        (("image", "mean"), [0.5, 0.5]),
        (("image", "patch_size"), 0),
        (("max_prompt_tokens",), 0),
        (("drift", "mean_kl"), 0),
        (("drift", "pair_flips"), 1.5),
    ],
)
def test_what_a_contract_may_not_say(contract: Json, place: Place, new: object) -> None:
    data = changed(contract, place, new)
    assert not accepts(CONTRACT, data)
    with pytest.raises(ContractError):
        ScoreContract.from_dict(data)
