"""Where the scores of `zreward eval` come from: a bundle, a checkpoint, or a file that `zreward score` wrote.

Each function returns the predictions in the order of the data set, with what the report says about their source. An
item that cannot be scored is NaN there, and its reason is told on stderr. Libraries are imported when they are needed:
evaluating a file needs neither a backend nor torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zreward.commands import console

if TYPE_CHECKING:
    from zreward.contract import ScoreContract
    from zreward.evaluation import Floats, Labels, Predictions
    from zreward.evaluation_report import Reasoning, Source, SourceKind
    from zreward.progress import Progress
    from zreward.runtime.backends.options import GpuOptions
    from zreward.training.model import RewardModel
    from zreward.training.sequences import Row

_CHUNK = 32  # pairs scored between two steps of the progress bar
_CHECKPOINT_CHUNK = 8  # the same for a checkpoint, which is slower
_ROWS = 8  # sequences in one pass of a checkpoint, as in training


class Scored(NamedTuple):
    """Predictions and where they came from."""

    predictions: Predictions
    source: Source


def source_kind(source: Path) -> SourceKind:
    """What `source` is, by the files in it.

    Raises:
        UsageError: it is a folder of something else.
    """
    from zreward.bundle import MANIFEST_FILE
    from zreward.checkpoint import CONFIG_FILE
    from zreward.errors import UsageError

    if not source.is_dir():
        return "scores"
    if (source / MANIFEST_FILE).is_file():
        return "bundle"
    if (source / CONFIG_FILE).is_file():
        return "checkpoint"
    raise UsageError(
        f"{source}: neither a bundle (no {MANIFEST_FILE}) nor a checkpoint (no {CONFIG_FILE}) is in this folder"
    )


def from_score_file(path: Path, labels: Labels) -> Scored:
    """Scores that were made before."""
    from zreward.evaluation_report import Source
    from zreward.score_file import read_score_file

    found = read_score_file(path, labels)
    return Scored(
        found.predictions, Source("scores", str(path), found.contract, found.bundle, notes=found.notes)
    )


def from_bundle(
    path: Path,
    labels: Labels,
    threads: int | None,
    progress: Progress,
    *,
    provider: str = "auto",
    gpu: GpuOptions | None = None,
) -> Scored:
    """Scores of an exported model, by the runtime; provider, threads and gpu as of `Scorer.open`."""
    import numpy as np

    from zreward.evaluation import Predictions
    from zreward.evaluation_report import Source
    from zreward.runtime import Score, Scorer

    with Scorer.open(path, provider=provider, threads=threads, gpu=gpu) as scorer:
        contract = scorer.contract
        _check_dimensions(contract, labels, path)
        probs = np.full((*labels.scores.shape, len(contract.bins)), np.nan)
        for start in range(0, len(labels.pairs), _CHUNK):
            chunk = labels.pairs[start : start + _CHUNK]
            results = scorer.score_pairs([(pair.prompt, pair.image) for pair in chunk], errors="return")
            for item, result in enumerate(results, start):
                if isinstance(result, Score):
                    probs[item] = [result[name].probs for name in labels.dimensions]
                else:
                    console.say(f"item {item + 1}: {result}")
            progress("scoring", start + len(chunk), len(labels.pairs))
        opened = scorer.engine.opened
        source = Source(
            "bundle",
            str(path),
            contract.sha256,
            scorer.bundle.sha256,
            notes=() if opened.provider == "cpu" else (f"Scores are those of {opened.details}.",),
            packages=tuple(opened.packages),
        )
    return Scored(Predictions.of_distributions(probs, contract.bins), source)


def from_checkpoint(
    path: Path, labels: Labels, reasoning: Reasoning | None, threads: int | None, progress: Progress
) -> Scored:
    """Scores of a model by torch, in float32 and at the contract's temperatures.

    With `reasoning` the model writes traces first; the distributions after those that end in an answer are averaged.

    Raises:
        UsageError: the packages for training are not installed, or the contract lacks a labelled dimension.
        ContractError: it is missing or does not fit the model, or leaves no place for a trace.
        CheckpointError: the checkpoint is incomplete, damaged or of another architecture.
    """
    import numpy as np

    from zreward.checkpoint import Checkpoint
    from zreward.evaluation import Predictions
    from zreward.evaluation_report import Source

    contract = Checkpoint.open(path).contract()
    _check_dimensions(contract, labels, path)
    if reasoning:
        _ = contract.template.reasoning_question  # refused before the weights are read
    model = _load(path, threads)
    probs = np.full((*labels.scores.shape, len(contract.bins)), np.nan)
    for start in range(0, len(labels.pairs), _CHECKPOINT_CHUNK):
        items = range(start, min(start + _CHECKPOINT_CHUNK, len(labels.pairs)))
        reasoning = _ask(model, labels, items, reasoning, probs)
        progress("scoring", items.stop, len(labels.pairs))
    packages = ("torch", "transformers")
    source = Source("checkpoint", str(path), contract.sha256, reasoning=reasoning, packages=packages)
    return Scored(Predictions.of_distributions(probs, contract.bins), source)


def _check_dimensions(contract: ScoreContract, labels: Labels, path: Path) -> None:
    """Before the work, not after it."""
    from zreward.errors import UsageError

    for name in labels.dimensions:
        if name not in contract.dimension_names:
            raise UsageError(
                f"the data set has labels of {name!r}, which the contract of {path} does not ask for; it asks for "
                f"{', '.join(contract.dimension_names)}"
            )


class _Question(NamedTuple):
    """A labelled dimension of an item, both by number, and the sequence that asks about it."""

    item: int
    column: int
    row: Row


def _ask(
    model: RewardModel, labels: Labels, items: range, reasoning: Reasoning | None, probs: Floats
) -> Reasoning | None:
    """Fill in the answers of items in `probs` [n, dimensions, bins], and return `reasoning` with their traces counted.

    The answer of a question that failed stays NaN.
    """
    import numpy as np

    questions = _askable(model, labels, items)
    answers, reasoning = _answers(model, [question.row for question in questions], reasoning, items.start)
    failed: dict[int, list[str]] = {}
    for (item, column, _), answer in zip(questions, answers, strict=True):
        if np.isfinite(answer).all():
            probs[item, column] = answer
        else:
            failed.setdefault(item, []).append(labels.dimensions[column])
    for item, names in failed.items():
        what = "no trace ended in an answer" if reasoning else "the model gave no usable distribution"
        console.say(f"item {item + 1}: {what} ({', '.join(names)})")
    return reasoning


def _load(path: Path, threads: int | None) -> RewardModel:
    from zreward.errors import UsageError

    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it once, when it is imported
    try:
        from accelerate import PartialState
        from accelerate.utils import is_cuda_available

        from zreward.training.config import ModelConfig
        from zreward.training.model import freeze, load_model
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a checkpoint needs the package {error.name}; install it with `pip install 'zreward[train]'`, or export "
            "the checkpoint and evaluate the bundle"
        ) from None
    device = PartialState(cpu=not is_cuda_available()).device
    with console.working(f"loading {path}"):
        return freeze(load_model(ModelConfig(str(path), precision="fp32"), device))


def _askable(model: RewardModel, labels: Labels, items: Sequence[int]) -> list[_Question]:
    """The labelled questions of items whose image and prompt can be used; of the others the reason is told."""
    import numpy as np

    from zreward.errors import ImageError, PromptError
    from zreward.training.sequences import Row

    names = model.contract.dimension_names
    found = []
    for item in items:
        pair = labels.pairs[item]
        columns = np.flatnonzero(~np.isnan(labels.scores[item])).tolist()
        rows = [Row(pair.prompt, pair.image, names.index(labels.dimensions[column])) for column in columns]
        try:
            model.collator.batch(rows[:1])
        except (ImageError, PromptError) as error:
            console.say(f"item {item + 1}: {error}")
            continue
        found += [_Question(item, column, row) for column, row in zip(columns, rows, strict=True)]
    return found


def _answers(
    model: RewardModel, rows: Sequence[Row], reasoning: Reasoning | None, number: int
) -> tuple[Floats, Reasoning | None]:
    """Of each question the mean distribution of its answered traces, float64 [rows, bins]; NaN where there is none.

    Returns:
        The distributions, and `reasoning` with these traces counted.
    """
    import numpy as np

    from zreward.training.passes import run_rows
    from zreward.training.rollout import Sampling, sample_outputs

    if not rows:
        return np.empty((0, len(model.contract.bins))), reasoning
    asked, traces = rows, 1
    if reasoning:
        # A seed for each chunk: its samples do not depend on how many tokens were drawn before it.
        seed = int(np.random.SeedSequence([reasoning.seed, number]).generate_state(1)[0])
        traces = reasoning.traces
        groups = sample_outputs(model, rows, Sampling(traces, reasoning.max_new_tokens), seed, _ROWS)
        asked = [row for group in groups for row in group]
    out = run_rows(model, model, asked, _ROWS)
    temperatures = np.array([model.contract.temperatures[row.dimension] for row in asked])
    probs = _softmax(np.asarray(out.log_probs_nk.cpu().double().numpy()) / temperatures[:, None])
    answered = np.asarray(out.valid_n.cpu().numpy()).reshape(len(rows), traces)
    if reasoning:
        n_sampled, n_answered = (
            reasoning.n_sampled + answered.size,
            reasoning.n_answered + int(answered.sum()),
        )
        reasoning = dataclasses.replace(reasoning, n_sampled=n_sampled, n_answered=n_answered)
    sums = np.where(answered[:, :, None], probs.reshape(len(rows), traces, -1), 0).sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing was answered
        return sums / answered.sum(axis=1)[:, None], reasoning


def _softmax(logits: Floats) -> Floats:
    import numpy as np

    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
