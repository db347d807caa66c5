"""Post-hoc reasoning chains: a model is told the score of a question and asked for reasons.

What RewardDance's form of SFT learns from. The reasons follow the score and not the other way round, which is the
weakness of the method that the paper points at.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from zreward.checkpoint import Checkpoint
from zreward.contract import ScoreContract
from zreward.errors import UsageError
from zreward.jsonfile import write_text
from zreward.progress import Progress
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.training.config import ModelConfig
from zreward.training.data import Question, TrainingSet, load_training_set
from zreward.training.model import contract_of, freeze, load_model
from zreward.training.rollout import Rollout, Sampling, sample_outputs
from zreward.training.rollout_server import Server, check_served, server_rollout
from zreward.training.sequences import Collator, Row
from zreward.training.traces import TraceReader

HINT = " The answer is {code}, which stands for {score:g} on a scale from {low:g} to {high:g}. Explain briefly why."

_AT_ONCE = 16  # questions between two steps of the progress bar; with a server, as many as it is sent at once


def write_chains(
    checkpoint: str,
    data_path: Path,
    output: Path,
    sampling: Sampling,
    *,
    seed: int = 0,
    micro_batch: int = 8,
    precision: str = "auto",
    progress: Progress = lambda *_: None,
    server: Server | None = None,
) -> tuple[int, int]:
    """Write one chain for every labelled question of a data set whose lines have ids.

    With `server` the chains are sampled there, and of the checkpoint only its tokenizer and contract are used.

    Returns:
        How many chains were written, and how many outputs never ended their reasoning and are left out.

    Raises:
        UsageError: a line has no id, no question has a label, or no output ended.
        BackendError: the server cannot be used (`zreward.training.rollout_server`).
    """
    config = ModelConfig(checkpoint, precision=precision)
    source = Checkpoint.open(checkpoint)
    contract = contract_of(source, config)
    data = load_training_set(data_path, contract)
    unnamed = next((index for index, item in enumerate(data.items) if item.id is None), None)
    if unnamed is not None:
        raise UsageError(
            f"{data.path}, line {unnamed + 1}: no 'id', by which a chain names its image; add one"
        )
    encoder = PromptEncoder(contract, load_tokenizer(source.path))
    if server is not None:
        check_served(server)
        rollout: Rollout = server_rollout(server, source, Collator(contract, encoder, pad_id=0))
    else:
        rollout = _local_rollout(config, micro_batch)
    reader = TraceReader(encoder)
    questions = data.questions(labelled=True)
    at_once = server.in_flight if server else _AT_ONCE
    lines: list[str] = []
    for start in range(0, len(questions), at_once):
        asked = questions[start : start + at_once]
        rows = [told(data, question, contract) for question in asked]
        groups = rollout(rows, sampling, seed + start)
        for question, group in zip(asked, groups, strict=True):
            for row in group:
                text = reader.trace_text(row.output or ())
                if text and reader.end_id in (row.output or ()):
                    name = contract.dimension_names[question.dimension]
                    line = {"id": data.items[question.item].id, "dimension": name, "chain": text}
                    lines.append(json.dumps(line, ensure_ascii=False))
        progress("writing chains", min(start + at_once, len(questions)), len(questions))
    if not lines:
        raise UsageError(
            f"{checkpoint}: none of its outputs ended their reasoning; raise --max-new-tokens, or take a model that "
            "reasons"
        )
    write_text(output, "".join(line + "\n" for line in lines))
    return len(lines), len(questions) * sampling.group_size - len(lines)


def _local_rollout(config: ModelConfig, micro_batch: int) -> Rollout:
    model = freeze(load_model(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return lambda rows, sampling, seed: sample_outputs(model, rows, sampling, seed, micro_batch)


def told(data: TrainingSet, question: Question, contract: ScoreContract) -> Row:
    """The question with its label given away."""
    item = data.items[question.item]
    label = float(data.scores[question])
    nearest = min(range(len(contract.bins)), key=lambda index: abs(contract.bins[index] - label))
    hint = HINT.format(
        code=contract.codes[nearest],
        score=contract.bins[nearest],
        low=contract.bins[0],
        high=contract.bins[-1],
    )
    return Row(item.prompt, item.image, question.dimension, hint=hint)
