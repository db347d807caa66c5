"""zreward.engines: which engine runs where, and what is refused before TensorRT sees it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from zreward.bundle import Bundle
from zreward.engines import (
    BuiltEngine,
    EngineInfo,
    GraphEngine,
    Profile,
    engine_name,
    engines_of,
    parse_capability,
    select_engine,
    write_engine_info,
)
from zreward.errors import BackendError, BundleError
from zreward.hashing import file_sha256

INPUTS: dict[str, tuple[int | str, ...]] = {
    "x": ("rows", "tokens", 8),
    "state": ("states", 4),
    "last": ("rows",),
}
PREFIX = Profile("prefix", {"rows": (1, 1, 2), "tokens": (1, 100, 400), "states": (1, 1, 1)})
QUESTIONS = Profile("questions", {"rows": (1, 4, 32), "tokens": (3, 9, 9), "states": (1, 1, 8)})
GRAPH = GraphEngine(0, "", INPUTS, (PREFIX, QUESTIONS))
HERE = {"flavour": "tensorrt", "tensorrt_version": "10.16.1.11", "compute_capability": "8.9"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """An opened bundle, of which nothing but its directory and its hash is read here."""
    return Bundle(tmp_path, manifest=None, contract=None, sha256="5" * 64)  # type: ignore[arg-type]


def add_engine(bundle: Bundle, **changes: Any) -> BuiltEngine:
    """An engine in the bundle's directory, by default one that fits `HERE`."""
    facts: dict[str, Any] = {
        "flavour": "tensorrt",
        "tensorrt_version": "10.16.1.11",
        "compute_capabilities": ("8.9",),
        "precision": "fp16",
        "bundle_sha256": bundle.sha256,
        "plugins": {},
        "zreward_version": "0.1.0",
        **changes,
    }
    name = engine_name(facts["flavour"], facts["compute_capabilities"], with_plugins=bool(facts["plugins"]))
    path = bundle.path / "engines" / name
    path.mkdir(parents=True)
    graphs = {}
    for graph in ("vision", "decoder"):
        file = path / f"{graph}.engine"
        file.write_bytes(graph.encode() * 100)
        graphs[graph] = dataclasses.replace(GRAPH, bytes=file.stat().st_size, sha256=file_sha256(file))
    info = EngineInfo(graphs=graphs, **facts)
    write_engine_info(path, info)
    return BuiltEngine(path, info)


def test_an_engine_is_read_back_as_it_was_written(bundle: Bundle) -> None:
    written = add_engine(bundle)
    (found,) = engines_of(bundle)
    assert found == written
    assert select_engine(bundle, **HERE) == written
    assert found.read("vision") == b"vision" * 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt_version": "11.4.0.106"}, "was built by version 11.4.0.106, and 10.16.1.11 is installed"),
        ({"compute_capabilities": ("9.0",)}, "for compute capability 9.0, and this GPU has 8.9"),
        ({"compute_capabilities": ("9.0+",)}, "for compute capability 9.0 and later, and this GPU has 8.9"),
        ({"bundle_sha256": "6" * 64}, "was built from another export of this bundle"),
        ({"flavour": "tensorrt-rtx"}, "it has no engine of tensorrt"),
    ],
)
def test_an_engine_for_elsewhere_is_refused_with_the_way_out(
    bundle: Bundle, changes: dict[str, Any], message: str
) -> None:
    add_engine(bundle, **changes)
    with pytest.raises(BackendError) as caught:
        select_engine(bundle, **HERE)
    assert message in str(caught.value)
    assert f"Build one for this machine with `zreward engine {bundle.path}`" in str(caught.value)


def test_a_bundle_without_engines_says_how_to_build_one(bundle: Bundle) -> None:
    assert engines_of(bundle) == ()
    with pytest.raises(BackendError, match=r"no engine of tensorrt-rtx.*--flavour tensorrt-rtx`"):
        select_engine(bundle, **{**HERE, "flavour": "tensorrt-rtx"})


@pytest.mark.parametrize(
    ("built", "device", "fits"),
    [
        (("8.9",), "8.9", True),
        (("8.9",), "8.6", False),
        (("8.0+",), "8.0", True),
        (("8.0+",), "12.0", True),
        (("8.0+",), "7.5", False),
        (("8.6", "12.0"), "12.0", True),
    ],
)
def test_kinds_of_gpus(bundle: Bundle, built: tuple[str, ...], device: str, fits: bool) -> None:
    assert add_engine(bundle, compute_capabilities=built).info.runs_on(device) == fits


def test_the_engine_of_this_machine_is_found_among_others(bundle: Bundle) -> None:
    add_engine(bundle, compute_capabilities=("8.6",))
    expected = add_engine(bundle)
    add_engine(bundle, flavour="tensorrt-rtx", compute_capabilities=("8.0+",), tensorrt_version="1.7.1.116")
    assert select_engine(bundle, **HERE) == expected


def test_plugins_are_preferred_where_their_library_is_given(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "libzreward_plugins.so"
    library.write_bytes(b"machine code")
    plain = add_engine(bundle)
    with_plugins = add_engine(bundle, plugins={library.name: file_sha256(library)})
    assert select_engine(bundle, **HERE, plugins=library) == with_plugins
    assert select_engine(bundle, **HERE) == plain
    assert not caplog.messages
    library.write_bytes(b"machine code of another build")
    assert select_engine(bundle, **HERE, plugins=library) == plain
    assert "runs without plugins, since tensorrt-sm89-plugins was built with others" in caplog.text


def test_a_missing_or_altered_library_is_never_loaded(bundle: Bundle, tmp_path: Path) -> None:
    library = tmp_path / "libzreward_plugins.so"
    library.write_bytes(b"machine code")
    add_engine(bundle, plugins={library.name: file_sha256(library)})
    with pytest.raises(
        BackendError, match=r"plugins of libzreward_plugins.so; name the library.*plugins build"
    ):
        select_engine(bundle, **HERE)
    with pytest.raises(BackendError, match=r"gone.so does not exist"):
        select_engine(bundle, **HERE, plugins=tmp_path / "gone.so")
    library.write_bytes(b"other machine code")
    with pytest.raises(BackendError, match=r"not the libzreward_plugins.so .* is not loaded"):
        select_engine(bundle, **HERE, plugins=library)


def test_a_damaged_engine_is_refused(bundle: Bundle) -> None:
    engine = add_engine(bundle)
    file = engine.file("decoder")
    data = file.read_bytes()
    engine.check_files()
    file.write_bytes(data[:-1])
    with pytest.raises(
        BundleError, match=r"decoder.engine: the engine has 699 bytes and should have 700.*--force"
    ):
        engine.read("decoder")
    file.write_bytes(data[:-1] + b"!")
    for check in (engine.check_files, lambda: engine.read("decoder")):
        with pytest.raises(BundleError, match=r"was altered \(its sha256 differs\)"):
            check()
    file.unlink()
    for check in (engine.check_files, lambda: engine.read("decoder")):
        with pytest.raises(BundleError, match=r"cannot be read \(No such file"):
            check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "zreward.bundle"}, "its schema is not 'zreward.engine'"),
        ({"version": 2}, "its version is not 1"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"compute_capabilities": ["new"]}, "'new' is not of the form 8.9"),
        ({"graphs": {}}, "has the graphs vision, decoder"),
    ],
)
def test_a_record_that_is_not_understood_is_an_error(
    bundle: Bundle, change: dict[str, Any], message: str
) -> None:
    file = add_engine(bundle).path / "engine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        engines_of(bundle)


def test_half_built_engines_are_not_seen(bundle: Bundle) -> None:
    engine = add_engine(bundle)
    engine.path.rename(engine.path.with_name(f".{engine.path.name}.partial-1"))
    assert engines_of(bundle) == ()


def shapes(rows: int, tokens: int, states: int) -> dict[str, tuple[int, ...]]:
    return {"x": (rows, tokens, 8), "state": (states, 4), "last": (rows,)}


def test_the_first_profile_that_fits_is_taken() -> None:
    assert GRAPH.profile_for(shapes(1, 400, 1)) == 0
    assert GRAPH.profile_for(shapes(4, 9, 1)) == 1
    assert GRAPH.profile_for(shapes(32, 3, 8)) == 1


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (shapes(1, 401, 1), "tokens is 401, and 'prefix' takes 1 to 400; tokens is 401, and 'questions'"),
        (shapes(33, 9, 8), r"rows is 33, and 'questions' takes 1 to 32\); build one for more .*--images N"),
        (
            {**shapes(2, 9, 1), "last": (3,)},
            r"input 'last' of \[3\]: rows is 2 in the inputs before it",
        ),
        (
            {**shapes(2, 9, 1), "x": (2, 9, 7)},
            r"input 'x': the engine takes \['rows', 'tokens', 8\], not \(2, 9, 7\)",
        ),
        ({"x": (2, 9, 8)}, "input 'state': the engine takes"),
        ({**shapes(2, 9, 1), "state": (1, 4, 1)}, "input 'state'"),
    ],
)
def test_other_shapes_are_refused(found: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        GRAPH.profile_for(found)


def test_profiles_must_be_ranges_of_all_axes() -> None:
    with pytest.raises(BundleError, match="no range"):
        Profile("odd", {"rows": (2, 1, 3)})
    with pytest.raises(BundleError, match="has the axes"):
        dataclasses.replace(GRAPH, profiles=(Profile("odd", {"rows": (1, 1, 1)}),))
    with pytest.raises(BundleError, match="at least one profile"):
        dataclasses.replace(GRAPH, profiles=())


def test_capabilities_compare_as_numbers() -> None:
    assert parse_capability("12.0") > parse_capability("8.9")
    with pytest.raises(BundleError):
        parse_capability("sm_89")
