"""The model card of a reference student, written from the figures of the run that made it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zreward.jsonfile import write_text
from zreward.training.reference_recipe import Recipe

_CARD = """\
# Reference student

A small visual reward model of the Qwen3.5 architecture ({millions:.2f} M parameters, bfloat16), trained
by this project on its own synthetic scenes (`docs/synthetic.md`). It exists so that export,
quantization, runtime, demo and tests have a real trained checkpoint to work on. It knows drawn balls,
cubes, cones and cylinders in a room and nothing else: do not use its scores on photographs or on the
output of image generators.

Made by

    {command}

{history}

## Held-out figures

{prompts} test prompts, {candidates} candidates each. Measured on the saved bfloat16 weights, by
transformers' full forward pass in float32, one question per sequence, against the simulated panel's labels.
The ceiling is the HPA of the latent truth against annotators who were not seen before.

| dimension | HPA (95 %) | pairs | margin HPA | pairs | PLCC | SRCC | label-noise ceiling |
|---|---|---|---|---|---|---|---|
{rows}

One temperature per dimension was fitted on the validation split and is part of `contract.json`: {temperatures}.
"""


def write_card(out: Path, recipe: Recipe, result: Mapping[str, Any], command: str, history: str) -> None:
    """Write `README.md` beside the weights.

    Args:
        recipe: which has the held-out splits.
        result: figures of the run.
        history: how the student came to be, a paragraph.
    """
    temperatures = ", ".join(f"{name} {value:g}" for name, value in result["temperatures"].items())
    text = _CARD.format(
        millions=result["parameters"] / 1e6,
        command=command,
        history=history,
        prompts=recipe.test_prompts,
        candidates=recipe.candidates,
        rows=figure_rows(result["test"], result["test_label_noise_ceiling"]),
        temperatures=temperatures,
    )
    write_text(out / "README.md", text)


def figure_rows(figures: Mapping[str, Any], ceiling: Mapping[str, float]) -> str:
    """The rows of the card's table; a dash where a figure is not defined for all dimensions together."""
    rows = []
    for name, values in figures.items():
        low, high = values["hpa_95"]
        correlations = [f"{values[key]:.4f}" if key in values else "–" for key in ("plcc", "srcc")]
        cells = [
            name,
            f"{values['hpa']:.4f} ({low:.3f} to {high:.3f})",
            f"{values['pairs']:,}",
            f"{values['margin_hpa']:.4f}",
            f"{values['margin_pairs']:,}",
            *correlations,
            f"{ceiling[name]:.4f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
