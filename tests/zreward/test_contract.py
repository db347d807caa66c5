"""zreward.contract: a strict round trip, a hash that identifies, and every malformed contract refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zreward.contract import CONTRACT_FILE, ChatTemplate, Dimension, DriftLimits, ScoreContract
from zreward.errors import ContractError
from zreward.image import ImageSpec

DEFAULT = ScoreContract.default()
Place = tuple[str | int, ...]

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
dimensions = st.builds(
    Dimension,
    name=names,
    title=st.text(),
    rubric=st.text(),
    question=st.text().filter(str.strip),
    temperature=st.floats(1e-3, 1e3),
)
templates = st.builds(
    ChatTemplate,
    before_image=st.text().map(lambda t: t.replace("{", "") + "{system}x{prompt}"),
    image_token=st.text(min_size=1),
    after_image=st.text(),
    question=st.text().map(lambda t: "{question}" + t.replace("{", "")),
)


@st.composite
def contracts(draw: st.DrawFn) -> ScoreContract:
    bins = draw(st.lists(finite, min_size=2, max_size=9, unique=True))
    codes = draw(st.lists(st.text(min_size=1), min_size=len(bins), max_size=len(bins), unique=True))
    return ScoreContract(
        name=draw(st.text()),
        bins=tuple(sorted(bins)),
        codes=tuple(codes),
        dimensions=tuple(draw(st.lists(dimensions, min_size=1, max_size=3, unique_by=lambda d: d.name))),
        instruction=draw(st.text()),
        template=draw(templates),
        image=ImageSpec(patch_size=draw(st.integers(1, 32)), max_pixels=draw(st.integers(65536, 10**9))),
        max_prompt_tokens=draw(st.integers(1, 10**6)),
        drift=DriftLimits(draw(positive), draw(positive), draw(st.floats(1e-6, 1.0)), draw(positive)),
    )


def judge(codes: tuple[str, ...], bins: tuple[float, ...]) -> ScoreContract:
    """A contract of another closed-set judge."""
    return dataclasses.replace(DEFAULT, name="judge", codes=codes, bins=bins)


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every number and text of a JSON value, with the way to it."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*place, key))
    else:
        yield place, value


def plain(contract: ScoreContract) -> dict[str, Any]:
    """The JSON form with lists, free to be changed."""
    value: dict[str, Any] = json.loads(json.dumps(contract.to_dict()))
    return value


def changed(place: Place, value: Any) -> dict[str, Any]:
    """The default contract's JSON with one value replaced."""
    data = plain(DEFAULT)
    *way, last = place
    parent: Any = data
    for key in way:
        parent = parent[key]
    parent[last] = value
    return data


LEAVES = [(p, v) for p, v in leaves(plain(DEFAULT)) if p not in (("schema",), ("version",))]
OBJECTS: list[Place] = [(), ("template",), ("image",), ("dimensions", 2), ("drift",)]


def test_the_default_contract_is_that_of_z_reward() -> None:
    assert DEFAULT.bins == tuple(np.arange(1, 5.5, 0.5))
    assert "".join(DEFAULT.codes) == "123456789"
    assert DEFAULT.dimension_names == ("alignment", "realism", "aesthetics", "plausibility")
    assert DEFAULT.temperatures == (1.0,) * 4
    for dimension in DEFAULT.dimensions:
        assert dimension.title in DEFAULT.system_text
        assert dimension.rubric in DEFAULT.system_text
        assert DEFAULT.dimension(dimension.name) is dimension
    assert DEFAULT.system_text.startswith(DEFAULT.instruction)


@given(contracts())
@settings(max_examples=60, deadline=None)
def test_json_round_trip(contract: ScoreContract) -> None:
    again = ScoreContract.from_dict(plain(contract))
    assert again == contract
    assert again.sha256 == contract.sha256


def test_saved_and_loaded_from_file_and_directory(tmp_path: Path) -> None:
    path = DEFAULT.save(tmp_path)
    assert path == tmp_path / CONTRACT_FILE
    assert ScoreContract.load(path) == ScoreContract.load(tmp_path) == DEFAULT
    assert [p.name for p in tmp_path.iterdir()] == [CONTRACT_FILE]


def test_hash_is_that_of_the_sorted_compact_json(tmp_path: Path) -> None:
    on_disk = json.loads(DEFAULT.save(tmp_path).read_text(encoding="utf-8"))
    canonical = json.dumps(on_disk, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert DEFAULT.sha256 == hashlib.sha256(canonical.encode()).hexdigest()


def test_hash_does_not_depend_on_key_order() -> None:
    def reversed_keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reversed_keys(value[key]) for key in reversed(value)}
        return [reversed_keys(item) for item in value] if isinstance(value, list) else value

    assert ScoreContract.from_dict(reversed_keys(plain(DEFAULT))).sha256 == DEFAULT.sha256


def test_equal_contracts_have_equal_hashes() -> None:
    zero, minus = judge(("no", "yes"), (0.0, 1.0)), judge(("no", "yes"), (-0.0, 1.0))
    assert zero == minus
    assert zero.sha256 == minus.sha256


def test_hash_does_not_depend_on_how_a_number_was_written(tmp_path: Path) -> None:
    whole = dataclasses.replace(DEFAULT, bins=tuple(range(9)))  # type: ignore[arg-type]
    whole = dataclasses.replace(
        whole, dimensions=tuple(dataclasses.replace(d, temperature=2) for d in whole.dimensions)
    )
    whole.save(tmp_path)
    assert ScoreContract.load(tmp_path).sha256 == whole.sha256
    listed = dataclasses.replace(DEFAULT, bins=list(DEFAULT.bins), codes=list(DEFAULT.codes))  # type: ignore[arg-type]
    assert listed == DEFAULT
    assert hash(listed) == hash(DEFAULT)


@pytest.mark.parametrize(("place", "value"), LEAVES, ids=[".".join(map(str, p)) for p, _ in LEAVES])
def test_hash_changes_with_every_field(place: Place, value: Any) -> None:
    other = value + "x" if isinstance(value, str) else value + (1 if isinstance(value, int) else 0.125)
    assert ScoreContract.from_dict(changed(place, other)).sha256 != DEFAULT.sha256


def test_hash_changes_with_the_order_of_dimensions() -> None:
    other = dataclasses.replace(DEFAULT, dimensions=DEFAULT.dimensions[::-1])
    assert other.sha256 != DEFAULT.sha256


@pytest.mark.parametrize(("place", "value"), LEAVES, ids=[".".join(map(str, p)) for p, _ in LEAVES])
def test_every_field_refuses_every_other_type(place: Place, value: Any) -> None:
    wrong: list[Any] = [None, True, [], {}, "5" if not isinstance(value, str) else 5]
    for other in [*wrong, *([1.5] if isinstance(value, int) else [])]:
        with pytest.raises(ContractError):
            ScoreContract.from_dict(changed(place, other))


@pytest.mark.parametrize("place", OBJECTS, ids=str)
def test_unknown_and_missing_fields(place: Place) -> None:
    with pytest.raises(ContractError, match="unknown field 'colour'"):
        ScoreContract.from_dict(changed((*place, "colour"), 1))
    data = plain(DEFAULT)
    target: Any = data
    for key in place:
        target = target[key]
    for key in list(target):
        rest = copy.deepcopy(data)
        inner: Any = rest
        for step in place:
            inner = inner[step]
        del inner[key]
        required = {(): ("schema", "version", "name", "bins", "codes", "dimensions", "instruction")}
        if key in required.get(place, ()) or (place[:1] == ("dimensions",) and key != "temperature"):
            with pytest.raises(ContractError):
                ScoreContract.from_dict(rest)
        else:
            assert ScoreContract.from_dict(rest) == DEFAULT


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True])
def test_other_versions_are_refused(version: object) -> None:
    with pytest.raises(ContractError, match=r"version .* is not supported.*upgrade"):
        ScoreContract.from_dict(changed(("version",), version))


@pytest.mark.parametrize("data", [{}, {"schema": "zreward.bundle", "version": 1}, None, [], "text"])
def test_what_is_not_a_contract_is_refused(data: Any) -> None:
    with pytest.raises(ContractError):
        ScoreContract.from_dict(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": (1.0,), "codes": ("1",)}, "at least two"),
        ({"bins": ()}, "at least two"),
        ({"bins": (1, 2, 2, 3, 4, 5, 6, 7, 8)}, "increasing"),
        ({"bins": (*DEFAULT.bins[:8], math.nan)}, "finite"),
        ({"bins": (*DEFAULT.bins[:8], math.inf)}, "finite"),
        ({"bins": tuple("123456789")}, "finite number"),
        ({"codes": DEFAULT.codes[:8]}, "8 codes for 9 bins"),
        ({"codes": ("1",) * 9}, "distinct"),
        ({"codes": ("", *DEFAULT.codes[1:])}, "not empty"),
        ({"codes": (1, *DEFAULT.codes[1:])}, "texts"),
        ({"dimensions": ()}, "at least one"),
        ({"dimensions": DEFAULT.dimensions * 2}, "distinct names"),
        ({"max_prompt_tokens": 0}, "at least 1"),
        ({"instruction": "\ud800"}, "not valid Unicode"),
    ],
)
def test_inconsistent_contracts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        dataclasses.replace(DEFAULT, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Realism"}, "identifier"),
        ({"name": "photo realism"}, "identifier"),
        ({"name": ""}, "identifier"),
        ({"question": " \n"}, "question is empty"),
        ({"temperature": 0.0}, "> 0"),
        ({"temperature": -1.0}, "> 0"),
        ({"temperature": math.nan}, "finite"),
        ({"temperature": math.inf}, "finite"),
        ({"temperature": "1"}, "finite number"),
        ({"temperature": True}, "finite number"),
    ],
)
def test_malformed_dimensions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        dataclasses.replace(DEFAULT.dimensions[0], **change)


@pytest.mark.parametrize(
    "change",
    [
        {"before_image": "{prompt}"},
        {"before_image": "{system}{prompt}{prompt}"},
        {"question": "Score it:"},
        {"question": "{question}{question}"},
        {"image_token": ""},
    ],
)
def test_malformed_templates_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ContractError, match="template"):
        dataclasses.replace(DEFAULT.template, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_abs_difference": 0.0}, r"drift\.mean_abs_difference must be > 0"),
        ({"p99_abs_difference": -0.1}, r"drift\.p99_abs_difference must be > 0"),
        ({"mean_kl": math.nan}, r"drift\.mean_kl must be a finite number"),
        ({"mean_abs_difference": math.inf}, "finite"),
        ({"mean_kl": "0.03"}, "finite number"),
        ({"mean_kl": True}, "finite number"),
        ({"pair_flips": 2}, "a share and at most 1"),
    ],
)
def test_malformed_drift_limits_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        DriftLimits(**change)


def test_a_contract_without_drift_limits_has_the_default_ones() -> None:
    data = plain(DEFAULT)
    del data["drift"]
    assert ScoreContract.from_dict(data).sha256 == DEFAULT.sha256
    assert ScoreContract.from_dict(data).drift == DriftLimits()


def test_an_unknown_dimension_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ContractError, match=r"'beauty'.*alignment, realism"):
        DEFAULT.dimension("beauty")


def test_other_judges_are_contracts_too() -> None:
    words = judge(("bad", "poor", "fair", "good", "excellent"), (1, 2, 3, 4, 5))
    yes_no = judge(("no", "yes"), (0, 1))
    for contract in (words, yes_no):
        assert ScoreContract.from_dict(plain(contract)) == contract


def test_unusable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no score contract at .*contract\.json"):
        ScoreContract.load(tmp_path)
    path = DEFAULT.save(tmp_path)
    text = path.read_text(encoding="utf-8")
    damaged = {
        "truncated": text[: len(text) // 2],
        "empty": "",
        "a list": "[]",
        "a repeated key": text.replace('"name"', '"codes": [], "name"', 1),
        "NaN": text.replace('"temperature": 1.0', '"temperature": NaN', 1),
        "infinite": text.replace('"temperature": 1.0', '"temperature": 1e999', 1),
        "too large": text.replace('"temperature": 1.0', '"temperature": 1' + "0" * 400, 1),
        "lone surrogate": text.replace("You are", "\\ud800", 1),
    }
    for damage, content in damaged.items():
        assert content != text
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ContractError, match=r"contract\.json") as caught:
            ScoreContract.load(path)
        assert str(caught.value), damage
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ContractError, match="not valid JSON"):
        ScoreContract.load(path)
