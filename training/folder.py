"""The directory of a run: whose it is, and whether a run may go on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zreward.errors import UsageError
from zreward.jsonfile import read_json_object
from zreward.training.config import TrainConfig
from zreward.training.state import latest_state

CONFIG_FILE, RESULT_FILE, MODEL_FOLDER = "run.json", "training.json", "model"
"""`config.json` would be a name that checkpoints have: a checkpoint given as run.output must not be taken for a run."""

_FREE_TO_CHANGE = ("save_every", "keep", "log_every")
"""Fields of [run] that a continued run may have changed, because no weight depends on them."""


def check_output(config: TrainConfig, method: str) -> None:
    """Refuse a directory that holds a finished run, another run, or something else."""
    output = Path(config.run.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"run.output {output} is not a directory")
    if (output / MODEL_FOLDER).exists():
        raise UsageError(f"{output} holds a finished run; choose another run.output or remove it")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / CONFIG_FILE).is_file():
        raise UsageError(f"run.output {output} is not empty and holds no run; choose another one")
    if latest_state(output) is None:
        return
    before = read_json_object(output / CONFIG_FILE, UsageError)
    now = {"method": method, **config.to_dict()}
    changed = _difference(_comparable(before), _comparable(now))
    if changed:
        raise UsageError(
            f"{output} holds a run with another config ({changed} differs); finish it with the config that it began "
            "with, or choose another run.output"
        )


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Sections flattened to "section.key", in JSON's types, without what may change."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        if isinstance(values, dict):
            flat.update({f"{section}.{key}": _as_json(value) for key, value in values.items()})
        else:
            flat[section] = values
    return {
        key: value for key, value in flat.items() if key not in {f"run.{name}" for name in _FREE_TO_CHANGE}
    }


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    return next((key for key in sorted({*before, *now}) if before.get(key) != now.get(key)), None)
