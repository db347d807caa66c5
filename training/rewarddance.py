"""RewardDance as a baseline, in both of its forms.

chains   SFT on post-hoc reasoning chains that end in the annotated score. A model that was told the score wrote them
         (`zreward data chains`), so they explain a score rather than lead to it.
yes      P("yes") for "the first image is better than the second", learned from pairs with different labels. The
         score of an image is the mean of P("yes") against the other candidates of its prompt, so it exists only
         beside them, and what is saved answers that question and none of the contract's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zreward.errors import UsageError
from zreward.progress import Progress
from zreward.training import losses
from zreward.training.chains import Chain, load_chains
from zreward.training.config import TrainConfig
from zreward.training.data import LabelledPair, Question, TrainingSet
from zreward.training.passes import RowOutputs
from zreward.training.policy import reasoned_answers, training_pairs
from zreward.training.rollout import Sampling
from zreward.training.run import Run, check_inputs
from zreward.training.sequences import Row

COMPARISON = " Is the first image better in this than the second? Answer {yes} or {no}."


@dataclass(frozen=True)
class Options:
    """[method] of RewardDance.

    Attributes:
        form: "chains" or "yes".
        chains: JSONL of reasoning chains (`zreward.training.chains`); for the form of that name.
        score_weight: of the score's cross-entropy beside that of a chain's tokens; a chain has many tokens and one
            score, and the mean over tokens would hardly see it.
        max_new_tokens, temperature: of the reasoning at validation.
        validation_traces: outputs whose distributions are averaged for a validation score.
        answers: the texts of "yes" and "no", one token each.
    """

    form: str = "chains"
    chains: str | None = None
    score_weight: float = 1.0
    max_new_tokens: int = 1024
    temperature: float = 1.0
    validation_traces: int = 1
    answers: tuple[str, ...] = ("yes", "no")

    def __post_init__(self) -> None:
        if self.form not in ("chains", "yes"):
            raise UsageError(f'method.form must be "chains" or "yes", not {self.form!r}')
        if self.form == "chains" and self.chains is None:
            raise UsageError(
                "method.chains is missing: the JSONL of reasoning chains that this form learns from"
            )
        if self.score_weight < 0:
            raise UsageError(f"method.score_weight must not be negative, not {self.score_weight:g}")
        if len(self.answers) != 2 or self.answers[0] == self.answers[1]:
            raise UsageError(f"method.answers must be two different texts, not {self.answers}")


def train(config: TrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Train, save and validate; returns what `training.json` says.

    Raises:
        UsageError, CheckpointError: before any training (`Run.start`), or the chains or pairs do not fit the data.
        ZrewardError: the loss is not finite.
    """
    options = config.method_options(Options)
    return (_train_chains if options.form == "chains" else _train_yes)(config, options, progress)


def _train_chains(config: TrainConfig, options: Options, progress: Progress) -> dict[str, Any]:
    inputs = check_inputs(config, "rewarddance", labels="optional")
    of_item: dict[int, list[Chain]] = defaultdict(list)
    for chain in load_chains(Path(options.chains or ""), inputs.data):
        of_item[chain.question.item].append(chain)
    items = sorted(of_item)
    run = Run(inputs, progress)
    sampling = Sampling(options.validation_traces, options.max_new_tokens, options.temperature)
    answers = reasoned_answers(run, sampling, options.validation_traces)

    for step in run.steps():
        batch = [chain for item in run.batch(items, step) for chain in of_item[item]]
        labels = [float(run.data.scores[chain.question]) for chain in batch]
        labelled_n = torch.tensor([not math.isnan(label) for label in labels], device=run.device)
        known = torch.tensor([label for label in labels if not math.isnan(label)])
        targets_nk = losses.bin_targets(known, run.core.bins.cpu()).to(run.device)

        def loss_of(
            out: RowOutputs, targets_nk: Tensor = targets_nk, labelled_n: Tensor = labelled_n
        ) -> Tensor:
            text = losses.sequence_cross_entropy(out.token_log_probs_nt, out.mask_nt)
            if not labelled_n.any():
                return text
            return text + options.score_weight * losses.score_cross_entropy(
                out.log_probs_nk[labelled_n], targets_nk
            )

        loss = run.backward([chain_row(run, chain) for chain in batch], loss_of)
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)


def _train_yes(config: TrainConfig, options: Options, progress: Progress) -> dict[str, Any]:
    inputs = check_inputs(config, "rewarddance")
    pairs = [pair for pair in training_pairs(inputs) if decided(pair, inputs.data)]
    if not pairs:
        raise UsageError(f"{inputs.data.path}: every pair is a tie, and this form learns from preferences")
    run = Run(inputs, progress)
    hint = COMPARISON.format(yes=options.answers[0], no=options.answers[1])
    codes = tuple(run.core.collator.encoder.answer_id(text) for text in options.answers)
    siblings = candidates_by_prompt(run.validation) if run.validation else {}

    def answers(rows: Sequence[Row]) -> list[float]:
        """1 to 5 for a mean P("yes") of 0 to 1 against the other candidates."""
        values = []
        for row in rows:
            others = [image for image in siblings[row.prompt] if image != row.image]
            asked = [replace(row, against=other, hint=hint, codes=codes) for other in others]
            shares = run.outputs(asked).log_probs_nk[:, 0].exp() if asked else torch.tensor([0.5])
            values.append(1 + 4 * shares.mean().item())
        return values

    for step in run.steps():
        # Each pair in both orders over time, or the model learns which place is better.
        batch = [
            LabelledPair(pair.second, pair.first, pair.dimension) if swapped else pair
            for pair, swapped in zip(run.batch(pairs, step), swaps(run, step), strict=False)
        ]
        preferred = [
            run.data.scores[p.first, p.dimension] > run.data.scores[p.second, p.dimension] for p in batch
        ]
        preferred_n = torch.tensor(preferred, device=run.device)

        def loss_of(out: RowOutputs, preferred_n: Tensor = preferred_n) -> Tensor:
            return losses.preference_loss(out.log_probs_nk, preferred_n)

        rows = []
        for pair in batch:
            first = run.row(Question(pair.first, pair.dimension))
            second = run.data.items[pair.second].image
            rows.append(replace(first, against=second, hint=hint, codes=codes))
        loss = run.backward(rows, loss_of)
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)


def swaps(run: Run, step: int) -> list[bool]:
    """Which pairs of a step's batch are turned round, by chance."""
    rng = np.random.default_rng(run.sampling_seed(step))
    turned: list[bool] = (rng.random(run.config.run.batch_size) < 0.5).tolist()
    return turned


def decided(pair: LabelledPair, data: TrainingSet) -> bool:
    """Whether the labels prefer a side."""
    return bool(data.scores[pair.first, pair.dimension] != data.scores[pair.second, pair.dimension])


def candidates_by_prompt(data: TrainingSet) -> dict[str, list[Path]]:
    """The images of each prompt."""
    found: dict[str, list[Path]] = defaultdict(list)
    for item in data.items:
        found[item.prompt].append(item.image)
    return found


def chain_row(run: Run, chain: Chain) -> Row:
    """The chain and its end, and where there is a label the code of the nearest bin."""
    encoder, bins = run.core.collator.encoder, run.core.contract.bins
    output = encoder.trace_ids(chain.text).tolist()
    label = float(run.data.scores[chain.question])
    if not math.isnan(label):
        output.append(encoder.code_ids[min(range(len(bins)), key=lambda index: abs(bins[index] - label))])
    item = run.data.items[chain.question.item]
    return Row(item.prompt, item.image, chain.question.dimension, tuple(output))
