"""The house of design: which folder may import what, and that every package ships."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PYPROJECT["tool"]["setuptools"]["packages"]
FOLDERS: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]

UPPER_PACKAGES = ("export", "quant", "runtime", "training")
MAY_IMPORT = {
    "zreward": set[str](),
    "runtime": set[str](),
    "quant": set[str](),
    "export": {"quant"},
    "training": set[str](),
}
"""Which of the upper packages each folder may import besides the core; imports of itself are free."""

EXCEPTIONS = {
    ("export/parity.py", "runtime"),
    ("export/pieces.py", "runtime"),
    ("export/quantized.py", "runtime"),
}
"""A written bundle is proved with the engine that users will run, in this one module."""

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "mobius", "scipy")
FREE_OF_HEAVY = ("zreward", "runtime")
HEAVY_EXCEPTIONS = {"zreward/reference.py"}


@dataclass(frozen=True)
class Import:
    module: str
    in_function: bool
    for_typing_only: bool


def modules() -> list[Path]:
    return sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), False, False))


def _walk(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, in_function, typing_only) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide which package is meant"
        # `from zreward import runtime` names a module too, so both readings are checked.
        yield Import(node.module or "", in_function, typing_only)
        yield from (Import(f"{node.module}.{a.name}", in_function, typing_only) for a in node.names)
    in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        typing_child = typing_only or (_is_type_checking(node) and child in getattr(node, "body", []))
        yield from _walk(child, in_function, typing_child)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upper_package(module: str) -> str | None:
    """`runtime` for `zreward.runtime.scorer`; None for modules of the core and of others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "zreward" and len(parts) > 1 and parts[1] in UPPER_PACKAGES else None


def is_command_line(path: Path) -> bool:
    return path == ROOT / "zreward" / "cli.py" or path.parent == ROOT / "zreward" / "commands"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    folder = name.split("/")[0]
    for item in imports_of(path):
        target = upper_package(item.module)
        if target is None or target == folder or target in MAY_IMPORT[folder] or (name, target) in EXCEPTIONS:
            continue
        if is_command_line(path):
            assert item.in_function or item.for_typing_only, f"{item.module} must be imported lazily here"
        else:
            pytest.fail(f"{name} must not import {item.module}")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_out(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name.split("/")[0] not in FREE_OF_HEAVY or name in HEAVY_EXCEPTIONS:
        return
    heavy = [item.module for item in imports_of(path) if item.module.split(".")[0] in HEAVY]
    assert not heavy, f"{name} must work without {heavy}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_reference_is_imported_only_where_it_runs(path: Path) -> None:
    for item in imports_of(path):
        if item.module.startswith("zreward.reference"):
            assert path.parts[-2] not in ("zreward", "runtime", "backends"), "it imports torch"
            assert item.in_function or path.is_relative_to(ROOT / "training"), "it imports torch"


def test_every_package_is_listed() -> None:
    found = {
        ".".join((["zreward"] if top != "zreward" else []) + list(init.parent.relative_to(ROOT).parts))
        for top in MAY_IMPORT
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(PACKAGES)


def test_no_module_lies_outside_a_package() -> None:
    for path in modules():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} needs an __init__.py to ship"


def test_package_dir_maps_the_top_level_folders() -> None:
    assert {"zreward": "zreward"} | {f"zreward.{name}": name for name in UPPER_PACKAGES} == FOLDERS


def test_reader_sees_the_imports_it_should() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from zreward.runtime import A\n"
        "def f():\n    import zreward.export.build\n"
    )
    found = {item.module: item for item in _walk(ast.parse(source), False, False)}
    assert found["zreward.runtime"].for_typing_only
    assert found["zreward.export.build"].in_function
    assert upper_package("zreward.export.build") == "export"
    assert upper_package("zreward.errors") is None
