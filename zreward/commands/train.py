"""`zreward train METHOD --config FILE`."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from zreward.commands import console


class TrainMethod(StrEnum):
    SFT = "sft"
    REWARDDANCE = "rewarddance"
    GRPO = "grpo"
    GDSO = "gdso"
    RISD = "risd"
    OPD = "opd"


def train(
    method: Annotated[
        TrainMethod, typer.Argument(help="Which method of the paper, or which of its baselines.")
    ],
    config: Annotated[Path, typer.Option("--config", help="TOML file; docs/training.md has one per method.")],
) -> None:
    """Train a teacher or a student; run the same command again after a kill, and it goes on."""
    from zreward.errors import UsageError

    try:
        from zreward.training.config import load_config

        module = importlib.import_module(f"zreward.training.{method.value}")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"training needs the package {error.name}; install it with `pip install 'zreward[train]'`"
        ) from None
    loaded = load_config(config)
    with console.progress() as progress:
        result = module.train(loaded, progress)
    console.print_fact("method", method.value)
    console.print_fact("checkpoint", Path(loaded.run.output) / "model")
    console.print_fact("log", Path(loaded.run.output) / "log.jsonl")
    if result["validation"]:
        _print_figures(result["validation"])


def _print_figures(rows: list[dict[str, Any]]) -> None:
    from zreward.commands.evaluate import print_rows
    from zreward.evaluation import Agreement

    print_rows([Agreement(**row) for row in rows])
