"""Sampled outputs: G reasoning traces with their answers for each question.

transformers' `generate` samples them, after one pass over each prompt with its image for all its questions and groups.
A server (vLLM) can sample instead, behind the same function type (`zreward.training.rollout_server`).

Randomness is seeded by run, step and process, not carried along: a run that resumes at a step samples what it would
have sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from zreward.errors import UsageError
from zreward.training.model import RewardModel, banned_ids
from zreward.training.sequences import Row
from zreward.training.shard import is_sharded
from zreward.training.traces import TraceReader, UntilAnswer


@dataclass(frozen=True)
class Sampling:
    """How outputs are sampled.

    Attributes:
        group_size: G, outputs of each question. The paper does not say; 8 is common for GRPO.
        max_new_tokens: an output without an answer by then is a failed sample. The paper's traces have about 750.
        temperature: of the tokens. 1 is the policy itself, which the policy gradient assumes; the score distribution
            is read at temperature 1 whatever this is.
    """

    group_size: int = 8
    max_new_tokens: int = 1024
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.group_size < 1 or self.max_new_tokens < 4:
            raise UsageError(
                f"sampling needs a group_size of at least 1 and max_new_tokens of at least 4, not {self.group_size} "
                f"and {self.max_new_tokens}"
            )
        if not self.temperature > 0:
            raise UsageError(f"the sampling temperature must be > 0, not {self.temperature:g}")


Rollout = Callable[[Sequence[Row], Sampling, int], list[list[Row]]]
"""From questions (rows, whose outputs are ignored), how to sample, and a seed, to a group of rows for each."""


def sample_outputs(
    model: RewardModel, questions: Sequence[Row], sampling: Sampling, seed: int, micro_batch: int
) -> list[list[Row]]:
    """Sample a group of outputs for each question with the model itself.

    Args:
        micro_batch: sequences generated at a time; the largest whole number of groups in it, at least one.

    Returns:
        For each question its rows, outputs included; an output ends with its answer, or without one.
    """
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    at_once = max(1, micro_batch // sampling.group_size)
    groups: list[list[Row]] = []
    for start in range(0, len(questions), at_once):
        groups += _generated(model, questions[start : start + at_once], sampling)
    model.train(was_training)
    return groups


@torch.no_grad()
def _generated(model: RewardModel, questions: Sequence[Row], sampling: Sampling) -> list[list[Row]]:
    collator, net = model.collator, model.net
    batch = collator.batch([replace(row, output=()) for row in questions]).to(net.device)
    reader = TraceReader(collator.encoder)
    generated = model.generate(
        batch,
        sampling.group_size,
        partial(UntilAnswer, reader),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        suppress_tokens=banned_ids(net),
        synced_gpus=is_sharded(model),
    )
    end = net.generation_config.eos_token_id
    outputs = [trimmed(ids, reader, end) for ids in generated]
    size = sampling.group_size
    return [
        [replace(row, output=output) for output in outputs[index * size : (index + 1) * size]]
        for index, row in enumerate(questions)
    ]


def trimmed(ids: Sequence[int], reader: TraceReader, end: int | Sequence[int] | None) -> tuple[int, ...]:
    """An output up to its answer, or up to the end of text where there is none: what follows is padding."""
    place = reader.answer_position(ids)
    if place is not None:
        return tuple(ids[: place + 1])
    ends = {end} if isinstance(end, int) else set(end or ())
    for index, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: index + 1])
    return tuple(ids)
