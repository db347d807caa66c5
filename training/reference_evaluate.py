"""Figures of the reference student: held-out agreement, temperatures, the label-noise ceiling, the log."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen3_5ForConditionalGeneration

from zreward.contract import ScoreContract
from zreward.image import preprocess
from zreward.metrics import MARGIN, PairShare, bootstrap_interval, hpa, plcc, srcc
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.synthetic import DIMENSIONS, SceneConfig, label_noise_ceiling
from zreward.training.reference_data import SceneArrays, length_batches

FloatArray = NDArray[np.float64]

_TEMPERATURES = np.exp(np.linspace(np.log(0.4), np.log(2.5), 211))


def score_metrics(
    logits: FloatArray, data: SceneArrays, contract: ScoreContract, *, intervals: bool = False
) -> dict[str, Any]:
    """PLCC, SRCC, HPA and margin HPA per dimension, and HPA over all dimensions' pairs together.

    Args:
        logits: [N, q, bins] under each image's own prompt.
        intervals: also 95 % bootstrap intervals of HPA, over prompts.
    """
    means = expected_scores(logits, contract)
    labels = data.labels[:, 0].astype(np.float64)
    result: dict[str, Any] = {}
    for index, name in enumerate(contract.dimension_names):
        figures = pair_figures(means[:, [index]], labels[:, [index]], data.groups, intervals)
        figures["plcc"] = plcc(means[:, index], labels[:, index])
        figures["srcc"] = srcc(means[:, index], labels[:, index])
        result[name] = figures
    result["overall"] = pair_figures(means, labels, data.groups, intervals)
    return result


def pair_figures(
    means: FloatArray, labels: FloatArray, groups: NDArray[np.int64], intervals: bool
) -> dict[str, Any]:
    """HPA and margin HPA of all columns' same-prompt pairs together, with the number of pairs."""
    all_pairs, wide = _pooled_hpa(means, labels, groups), _pooled_hpa(means, labels, groups, MARGIN)
    figures: dict[str, Any] = {
        "hpa": all_pairs.value,
        "pairs": all_pairs.n_pairs,
        "margin_hpa": wide.value,
        "margin_pairs": wide.n_pairs,
    }
    if intervals:
        interval = bootstrap_interval(
            lambda rows, drawn: _pooled_hpa(means[rows], labels[rows], drawn).value, groups, n_resamples=300
        )
        figures["hpa_95"] = [interval.low, interval.high]
    return figures


def hpa_gain(means: FloatArray, before: FloatArray, data: SceneArrays) -> dict[str, Any]:
    """By how much HPA over all dimensions rises from one student to another on the same scenes.

    Args:
        means, before: expected scores [N, q] of the two.

    Returns:
        `hpa`, and `hpa_95` from drawing prompts, the same ones for both.
    """
    labels = data.labels[:, 0].astype(np.float64)

    def gain(rows: NDArray[np.intp], groups: NDArray[np.intp]) -> float:
        now, then = (_pooled_hpa(scores[rows], labels[rows], groups).value for scores in (means, before))
        return now - then

    interval = bootstrap_interval(gain, data.groups)
    return {"hpa": gain(np.arange(len(labels)), data.groups), "hpa_95": [interval.low, interval.high]}


def _pooled_hpa(
    means: FloatArray, labels: FloatArray, groups: NDArray[np.intp], margin: float = 0.0
) -> PairShare:
    """HPA of all columns' pairs together. A prompt's columns stay together where prompts are drawn."""
    columns = means.shape[1]
    pooled = np.concatenate([groups + column * (groups.max() + 1) for column in range(columns)])
    return hpa(means.T.ravel(), labels.T.ravel(), pooled, margin=margin)


def expected_scores(logits: FloatArray, contract: ScoreContract) -> FloatArray:
    """Expectations [N, q] of the bins at the contract's temperatures."""
    scaled = logits / np.array(contract.temperatures)[:, None]
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(weights @ np.array(contract.bins) / weights.sum(axis=-1))


def fit_temperatures(logits: FloatArray, data: SceneArrays, contract: ScoreContract) -> tuple[float, ...]:
    """Per dimension, the temperature with the least negative log-likelihood of the labels."""
    bins = np.array(contract.bins)
    fitted = []
    for index in range(logits.shape[1]):
        classes = np.abs(data.labels[:, 0, index, None] - bins).argmin(axis=1)
        scaled = logits[None, :, index] / _TEMPERATURES[:, None, None]
        shifted = scaled - scaled.max(axis=-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        likelihood = log_probs[:, np.arange(len(classes)), classes].mean(axis=1)
        fitted.append(round(float(_TEMPERATURES[likelihood.argmax()]), 4))
    return tuple(fitted)


@torch.inference_mode()
def served_logits(directory: Path, data: SceneArrays, batch: int = 24) -> FloatArray:
    """Score logits [N, q, bins] of a saved student by transformers' full passes, one question each."""
    contract = ScoreContract.load(directory)
    encoder = PromptEncoder(contract, load_tokenizer(directory))
    model = Qwen3_5ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    codes = list(encoder.code_ids)
    lengths = np.array([len(encoder.text_prefix_ids(str(text))) for text in data.prompts[:, 0]])
    logits = np.zeros((len(data), len(contract.dimensions), len(codes)))
    for rows in length_batches(np.random.default_rng(0), lengths, batch):
        patches = [preprocess(Image.fromarray(data.images[row]), contract.image) for row in rows]
        pixels = torch.from_numpy(np.concatenate([p.pixel_values for p in patches]))
        grids = torch.tensor([p.grid_thw for p in patches])
        for question in range(len(contract.dimensions)):
            texts = [
                encoder.sequence_ids(str(data.prompts[row, 0]), p.n_tokens, question)
                for row, p in zip(rows, patches, strict=True)
            ]
            ids = torch.from_numpy(np.stack(texts))
            answer = model(
                input_ids=ids,
                mm_token_type_ids=(ids == encoder.image_token_id).int(),
                pixel_values=pixels,
                image_grid_thw=grids,
                use_cache=False,
                logits_to_keep=1,
            )
            logits[rows, question] = answer.logits[:, -1, codes].double().numpy()
    return logits


def label_ceiling(data: SceneArrays, config: SceneConfig) -> dict[str, float]:
    """`label_noise_ceiling` of a split."""
    truths = data.true_scores[:, 0]
    scenes = []
    for group in np.unique(data.groups):
        rows = np.flatnonzero(data.groups == group)
        scenes.append(_Scene([_Truth(dict(zip(DIMENSIONS, truths[r].tolist(), strict=True))) for r in rows]))
    return label_noise_ceiling(scenes, config)


@dataclasses.dataclass(frozen=True)
class _Truth:
    true_scores: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class _Scene:
    candidates: Sequence[_Truth]


class RunLog:
    """Events of one run, one JSON object a line, and a short line each on stderr.

    A run that continues finished stages keeps their events.
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self._path = path
        self._started = time.monotonic()
        if not (resumed and path.exists()):
            path.write_text("", encoding="utf-8")

    def start(self, recipe: Any, command: str) -> None:
        versions = {
            name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")
        }
        self._write({"event": "start", "command": command, "versions": versions, **_plain(recipe)})

    def stage(self, name: str, log: Path) -> None:
        """Take over the events of a run of `zreward train`, which then say what stage they are of."""
        for line in log.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            self._write({"event": event.pop("event"), "stage": name, **_rounded(event)})

    def note(self, text: str) -> None:
        self._write({"event": "note", "text": text}, text)

    def curve(self, stage: str, step: int, minutes: float, loss: float) -> None:
        event = {"event": "loss", "stage": stage, "step": step, "minutes": round(minutes, 2)}
        self._write({**event, "loss": round(loss, 4)}, f"{stage} {step} ({minutes:.1f} min): loss {loss:.4f}")

    def validation(self, stage: str, step: int, minutes: float, figures: Mapping[str, Any]) -> None:
        event = {"event": "validation", "stage": stage, "step": step, "minutes": round(minutes, 2)}
        text = "  ".join(f"{n} {f['hpa']:.3f}/{f['margin_hpa']:.3f}" for n, f in figures.items())
        self._write({**event, "figures": _rounded(figures)}, f"{stage} {step}: {text}")

    def finish(self, result: Mapping[str, Any]) -> None:
        minutes = round((time.monotonic() - self._started) / 60, 1)
        event = {"event": "result", "minutes": minutes, **_rounded(result)}
        self._write(event, json.dumps(event, indent=2))

    def _write(self, event: Mapping[str, Any], text: str = "") -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        if text:
            print(text, file=sys.stderr, flush=True)


def _plain(recipe: Any) -> dict[str, Any]:
    return {"recipe": dataclasses.asdict(recipe)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
