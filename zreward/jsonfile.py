"""JSON files, read strictly and written in one step.

Strict means UTF-8, one object, no duplicate keys, no NaN or Infinity (which are not JSON) nor a number that
becomes infinite, such as 1e999; in a file, no half of a surrogate pair; and into a dataclass, no unknown,
missing or mistyped field. A file is written beside its final name and renamed, so that a reader never sees
half of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from zreward.errors import ZrewardError

MAX_JSON_BYTES = 64 * 1024 * 1024

T = TypeVar("T")


def parse_json_object(text: str) -> dict[str, Any]:
    """One JSON object from `text`.

    Raises:
        ValueError: the text is not JSON, not an object, repeats a key, is nested too deeply, or holds a
            number that is not finite.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_float=_finite, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path, error: type[ZrewardError]) -> dict[str, Any]:
    """The JSON object in the file at `path`; every failure is raised as `error` with the path in it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path}: {path.stat().st_size:,} bytes is too large for a JSON file of this kind")
        text = path.read_text(encoding="utf-8")
        value = parse_json_object(text)
        if "\\u" in text:  # only an escape can bring half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: not valid JSON ({cause})") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` with two-space indents, beside `path` first and then renamed over it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, beside `path` first and then renamed over it."""
    # Not tempfile, whose files only their owner can read: a bundle is often served by another user.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def dataclass_from_json(cls: type[T], data: Any, where: str, error: type[ZrewardError]) -> T:
    """An instance of the dataclass `cls` from a JSON object, checked against its annotations.

    Lists become tuples, objects become nested dataclasses or dictionaries, integers floats where a float
    is annotated. Every failure is raised as `error`, with `where` and the path to the field in it.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: expected an object, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise error(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise error(f"{where}: field {name!r} is missing")
    hints = get_type_hints(cls)
    values = {name: _typed(hints[name], value, f"{where}: {name}", error) for name, value in data.items()}
    try:
        return cls(**values)
    except error as cause:
        raise error(f"{where}: {cause}") from None


def _typed(hint: Any, value: Any, where: str, error: type[ZrewardError]) -> Any:
    """`value` converted to the annotated type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, Union):
        if value is None and type(None) in arguments:
            return None
        inner = [a for a in arguments if a is not type(None)]
        matching = [a for a in inner if a in _SCALARS and _SCALARS[a][1](value)]
        return _typed((matching or inner)[0], value, where, error)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise error(f"{where}: expected a list, found {type(value).__name__}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise error(f"{where}: expected {len(arguments)} values, found {len(value)}")
        return tuple(_typed(arguments[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise error(f"{where}: expected an object, found {type(value).__name__}")
        return {key: _typed(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return dataclass_from_json(hint, value, where, error)  # type: ignore[arg-type]  # a type, not an instance
    expected, check = _SCALARS[hint]
    if not check(value):
        raise error(f"{where}: expected {expected}, found {value!r}")
    if hint is not float:
        return value
    try:
        return float(value)
    except OverflowError:
        raise error(f"{where}: the number is too large") from None


_SCALARS: dict[Any, tuple[str, Any]] = {
    str: ("a string", lambda v: isinstance(v, str)),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"key {key!r} appears twice")
        value[key] = item
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of a number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
