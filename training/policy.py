"""What GRPO and GDSO share: pairs of groups of sampled outputs, their rewards and advantages, and the way they answer.

Order of rows everywhere: pair by pair, the first side's group, then the second's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from zreward.errors import UsageError
from zreward.training import losses
from zreward.training.data import LabelledPair, Question, load_pairs
from zreward.training.model import RewardModel, trainable
from zreward.training.passes import RowOutputs
from zreward.training.rollout import Sampling
from zreward.training.run import Inputs, Run
from zreward.training.sequences import Row
from zreward.training.shard import is_sharded
from zreward.training.validate import Answers


@dataclass(frozen=True)
class PolicyOptions:
    """[method] of GRPO, and a part of GDSO's.

    Attributes:
        sampling: how outputs are sampled.
        pointwise_reward, pairwise_reward: λ_pt and λ_pw of equation (13). The paper names no values; with equal
            weights a group's rewards differ about as much by either term.
        reward_from: "expectation" of the score distribution, or "parsed", the bin of the sampled answer (the paper's
            ablation, which quantizes 3.8 and 4.2 to one reward).
        beta: weight of KL(π_θ ‖ π_ref). 0 as in most recent GRPO recipes: the direct losses hold the scores in place.
        reference_every: steps after which π_ref becomes π_θ, the paper's outer iteration; without meaning for beta 0.
        clip: of the likelihood ratio, where a batch is used for several updates.
        updates: K_gdso, optimizer steps on each batch of samples.
        epsilon: of equation (3).
        validation_traces: outputs whose distributions are averaged for a validation score.
    """

    sampling: Sampling = field(default_factory=Sampling)
    pointwise_reward: float = 1.0
    pairwise_reward: float = 1.0
    reward_from: str = "expectation"
    beta: float = 0.0
    reference_every: int = 50
    clip: float = 0.2
    updates: int = 1
    epsilon: float = 1e-4
    validation_traces: int = 1

    def __post_init__(self) -> None:
        if self.reward_from not in ("expectation", "parsed"):
            raise UsageError(
                f'method.reward_from must be "expectation" or "parsed", not {self.reward_from!r}'
            )
        for name in ("reference_every", "updates", "validation_traces"):
            if getattr(self, name) < 1:
                raise UsageError(f"method.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("pointwise_reward", "pairwise_reward", "beta", "clip", "epsilon"):
            if getattr(self, name) < 0:
                raise UsageError(f"method.{name} must not be negative, not {getattr(self, name):g}")


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the policy that sampled a batch thought of its samples.

    Attributes:
        token_log_probs_nt: log π_old of the tokens.
        advantages_n: equation (3).
        figures: means for the log.
    """

    token_log_probs_nt: Tensor
    advantages_n: Tensor
    figures: dict[str, float]


class Samples:
    """The outputs of a batch of pairs.

    Attributes:
        rows: n = pairs · 2 · G, with outputs.
        shape: (pairs, 2, G).
        labels_pj: ŝ.
        reference_nt: log π_ref of the tokens; None without a KL term.
    """

    def __init__(
        self,
        rows: list[Row],
        labels_pj: Tensor,
        reference_nt: Tensor | None,
        judge: Callable[[RowOutputs], Judgement],
    ) -> None:
        self.rows = rows
        self.labels_pj = labels_pj
        self.reference_nt = reference_nt
        self.shape = _shape(rows, labels_pj)
        self._judge = judge
        self._judgement: Judgement | None = None

    def judgement(self, out: RowOutputs) -> Judgement:
        """Of the outputs of the first forward pass that this is asked with.

        In the first update after sampling the policy is still the one that sampled, so its pass serves both.
        """
        if self._judgement is None:
            self._judgement = self._judge(out)
        return self._judgement

    @property
    def figures(self) -> dict[str, float]:
        assert self._judgement is not None, "known after the first forward pass"
        return self._judgement.figures


def training_pairs(inputs: Inputs) -> list[LabelledPair]:
    """The chosen pairs of the config, or all same-prompt pairs of the data set.

    Raises:
        UsageError: there is none.
    """
    data, chosen = inputs.data, inputs.config.data.pairs
    if chosen is not None:
        return load_pairs(Path(chosen), data)
    pairs = data.pairs()
    if not pairs:
        raise UsageError(
            f"{data.path}: no two lines have the same prompt and labels in one dimension; this method learns from "
            "pairs of candidates of one prompt"
        )
    return pairs


def sample_pairs(
    run: Run, pairs: Sequence[LabelledPair], options: PolicyOptions, step: int, reference: Reference
) -> Samples:
    """Sample a group for each side of each pair."""
    questions = [
        run.row(Question(item, pair.dimension)) for pair in pairs for item in (pair.first, pair.second)
    ]
    groups = run.sample(questions, options.sampling, run.sampling_seed(step))
    rows = [row for group in groups for row in group]
    labels_pj = torch.tensor(
        [[run.data.scores[item, p.dimension] for item in (p.first, p.second)] for p in pairs],
        dtype=torch.float32,
        device=run.device,
    )
    reference_nt = reference.token_log_probs(run, rows) if options.beta else None

    def judge(out: RowOutputs) -> Judgement:
        return judged(run.core, rows, out, labels_pj, options)

    return Samples(rows, labels_pj, reference_nt, judge)


def _shape(rows: Sequence[Row], labels_pj: Tensor) -> tuple[int, int, int]:
    """(pairs, 2, G)."""
    pairs = len(labels_pj)
    return pairs, 2, len(rows) // (2 * pairs)


@torch.no_grad()
def judged(
    core: RewardModel, rows: Sequence[Row], out: RowOutputs, labels_pj: Tensor, options: PolicyOptions
) -> Judgement:
    """Rewards and advantages of the samples whose outputs under the policy that sampled them are `out`."""
    shape = _shape(rows, labels_pj)
    means_pjg, valid_pjg = _judged_scores(core, rows, out, options.reward_from, shape)
    rewards_pjg = losses.rewards(
        means_pjg,
        labels_pj,
        core.contract.bins[-1] - core.contract.bins[0],
        pointwise=options.pointwise_reward,
        pairwise=options.pairwise_reward,
        valid_pjg=valid_pjg,
    )
    valid = out.valid_n
    figures = {
        "reward": rewards_pjg.mean().item(),
        "reward_spread": rewards_pjg.std(-1, unbiased=False).mean().item(),
        "failed": 1 - valid.float().mean().item(),
        "off_scale": (out.off_scale_n[valid].mean() if valid.any() else torch.tensor(0.0)).item(),
        "tokens": out.mask_nt.sum(-1).float().mean().item(),
    }
    advantages_n = losses.group_advantages(rewards_pjg, options.epsilon).flatten()
    return Judgement(out.token_log_probs_nt.detach(), advantages_n, figures)


class Reference:
    """π_ref: the learning weights as they were some steps ago, kept beside the model and swapped in when it is asked.

    A run that resumes between two of its renewals reads it from the state.

    Raises:
        UsageError: it would have to be kept in pieces: states hold none of it for runs with `shard`.
    """

    def __init__(self, run: Run, options: PolicyOptions) -> None:
        self._every = options.reference_every
        self._needed = options.beta > 0
        if self._needed and is_sharded(run.core):
            raise UsageError(
                "method.beta > 0 keeps a second copy of the weights, which run.shard cannot; leave one of them out"
            )

    def renew(self, run: Run, step: int) -> None:
        """Set π_ref ← π_θ at the first step of every outer iteration."""
        if self._needed and step % self._every == 0:
            run.extra = {name: p.detach().clone() for name, p in trainable(run.core)}

    def token_log_probs(self, run: Run, rows: Sequence[Row]) -> Tensor:
        """log π_ref of the rows' tokens, [n, t]."""
        _swap(run.core, run.extra)
        try:
            return run.outputs(rows).token_log_probs_nt
        finally:
            _swap(run.core, run.extra)


def reasoned_answers(run: Run, sampling: Sampling, traces: int) -> Answers:
    """Answers after reasoning: the mean over the valid ones of `traces` sampled outputs; NaN where there is none."""

    def answers(rows: Sequence[Row]) -> list[float]:
        how = Sampling(traces, sampling.max_new_tokens, sampling.temperature)
        groups = run.sample(rows, how, run.config.run.seed)
        out = run.outputs([row for group in groups for row in group])
        means = losses.expectation(out.log_probs_nk, run.core.bins).view(len(rows), traces)
        weights = out.valid_n.view(len(rows), traces).float()
        mean = (means * weights).sum(-1) / weights.sum(-1)  # 0 / 0 is NaN
        values: list[float] = mean.tolist()
        return values

    return answers


def _judged_scores(
    core: RewardModel, rows: Sequence[Row], sampled: RowOutputs, source: str, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The score of each sample that its reward is computed from, and whether it has one, [p, j, g]."""
    if source == "expectation":
        means = losses.expectation(sampled.log_probs_nk, core.bins)
        return means.view(shape), sampled.valid_n.view(shape)
    bins = dict(zip(core.code_ids, core.contract.bins, strict=True))
    parsed = [
        bins.get((row.output or (0,))[-1]) if valid else None
        for row, valid in zip(rows, sampled.valid_n.tolist(), strict=True)
    ]
    values = torch.tensor([value if value is not None else 0.0 for value in parsed], device=core.net.device)
    known = torch.tensor([value is not None for value in parsed], device=core.net.device)
    return values.view(shape), known.view(shape)


@torch.no_grad()
def _swap(model: RewardModel, others: dict[str, Tensor]) -> None:
    """Exchange the learning weights with others of the same names."""
    for name, parameter in trainable(model):
        ours = parameter.detach().clone()
        parameter.copy_(others[name])
        others[name] = ours
