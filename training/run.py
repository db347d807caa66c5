"""A run under way: what every method shares around its own loop.

    run = Run.start(config, "sft")
    for step in run.steps():
        items = run.batch(range(len(run.data)), step)
        loss = run.backward(rows, loss_of)      # rows and their loss are the method's
        norm = run.update()
        run.record(step, loss=loss, gradient_norm=norm)
        run.validate(step, answers)
    return run.finish(answers)

`Run.start` finds everything wrong with the config, the data and the checkpoint before it trains, and continues a run
that was killed. Batches, sampling seeds and the learning rate are functions of the step, so a continued run does, bit
for bit, what it would have done (on one machine with one number of threads).

accelerate places the model: one process on a CPU or a GPU, or several when they are started by `accelerate launch` or
`torchrun`, each with a copy of the model (DDP) or, with `run.shard`, each with its part of it (FSDP).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from zreward.checkpoint import Checkpoint
from zreward.errors import UsageError, ZrewardError
from zreward.jsonfile import write_json
from zreward.progress import Progress
from zreward.staging import staged_directory
from zreward.training.config import TrainConfig
from zreward.training.data import Labelling, Question, TrainingSet, load_training_set
from zreward.training.folder import CONFIG_FILE, MODEL_FOLDER, RESULT_FILE, check_output
from zreward.training.log import TrainingLog, environment
from zreward.training.model import (
    contract_of,
    load_model,
    runs_in_bfloat16,
    trainable,
)
from zreward.training.optimize import learning_rate, make_optimizer
from zreward.training.passes import RowOutputs, backward, run_rows
from zreward.training.rollout import Sampling, sample_outputs
from zreward.training.save import save_checkpoint
from zreward.training.sequences import Row
from zreward.training.shard import shard
from zreward.training.state import latest_state, load_state, save_state
from zreward.training.validate import Answers, validate

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Inputs:
    """A config whose files were all opened and found good."""

    config: TrainConfig
    method: str
    data: TrainingSet
    validation: TrainingSet | None


def check_inputs(config: TrainConfig, method: str, labels: Labelling = "required") -> Inputs:
    """Everything that can be refused before a model is loaded; the output directory is then the run's.

    Raises:
        UsageError: the config, the data or the output directory cannot be used.
        ContractError, CheckpointError: the checkpoint is incomplete, damaged or of another architecture.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    first_process = int(os.environ.get("RANK", "0")) == 0
    if first_process:  # which writes there a moment later: the others might see half of it
        check_output(config, method)
    contract = contract_of(Checkpoint.open(config.model.checkpoint), config.model)
    data = load_training_set(Path(config.data.train), contract, labels)
    validation = None
    if config.data.validation is not None:
        validation = load_training_set(Path(config.data.validation), contract)
    output = Path(config.run.output)
    if first_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / CONFIG_FILE, {"method": method, **config.to_dict()})
    return Inputs(config, method, data, validation)


class Run:
    """See the module.

    Attributes:
        config: as read.
        method: its name.
        data, validation: opened data sets; `validation` may be None.
        model: what accelerate made of the model; `core` is the model itself.
        device: where it is.
        extra: tensors that a method carries from step to step; part of every state.
    """

    def __init__(self, inputs: Inputs, progress: Progress = lambda *_: None) -> None:
        config = inputs.config
        self.config, self.method = config, inputs.method
        self.data, self.validation = inputs.data, inputs.validation
        self.output = Path(config.run.output)
        self._progress = progress
        self._sums: dict[str, list[float]] = defaultdict(list)
        has_gpu = torch.cuda.is_available()
        half = runs_in_bfloat16(config.model, torch.device("cuda" if has_gpu else "cpu"))
        self.accelerator = Accelerator(cpu=not has_gpu, mixed_precision="bf16" if half else "no")
        self.device = self.accelerator.device
        if config.run.batch_size % self.world:
            raise UsageError(
                f"run.batch_size {config.run.batch_size} is no multiple of the {self.world} processes of this run"
            )
        torch.manual_seed(config.run.seed)
        self.core = load_model(config.model, self.device)
        if config.run.shard and self.world > 1:
            shard(self.core)
        self.optimizer = make_optimizer(self.core, config.optimizer)
        self.model = self.accelerator.prepare_model(self.core, evaluation_mode=config.run.shard)
        self.first_step = 0
        self.extra: dict[str, Tensor] = {}
        if (state := latest_state(self.output)) is not None:
            self.first_step, self.extra = load_state(state, self.core, self.optimizer)
        self.log = self._open_log()

    @staticmethod
    def start(
        config: TrainConfig,
        method: str,
        *,
        labels: Labelling = "required",
        progress: Progress = lambda *_: None,
    ) -> Run:
        """Check everything, load the model, and continue from the latest state if there is one.

        Raises:
            UsageError, ContractError, CheckpointError: see `check_inputs`; a state is damaged or does not fit.
        """
        return Run(check_inputs(config, method, labels), progress)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_first_process(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0; sets the learning rate before each and saves states after."""
        total, every = self.config.run.steps, self.config.run.save_every
        self.model.train()
        for step in range(self.first_step, total):
            self._progress("training", step, total)
            rate = learning_rate(self.config.optimizer, step, total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield step
            if every and (step + 1) % every == 0 and step + 1 < total:
                keep = self.config.run.keep
                save_state(self.output, step + 1, self.core, self.optimizer, self.extra, keep)
        self._progress("training", total, total)

    def batch(self, items: Sequence[T], step: int) -> list[T]:
        """This process's share of the batch of a step: every epoch is a new order of all items.

        Raises:
            UsageError: there are fewer items than a batch needs.
        """
        size = self.config.run.batch_size
        per_epoch = len(items) // size
        if per_epoch == 0:
            raise UsageError(
                f"run.batch_size is {size}, but {self.config.data.train} gives {len(items)} items to draw it from"
            )
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.config.run.seed, epoch]).permutation(len(items))
        chosen = order[place * size : (place + 1) * size]
        return [items[index] for index in chosen[self.accelerator.process_index :: self.world]]

    def sampling_seed(self, step: int) -> int:
        """A seed for what this process samples in a step."""
        key = [self.config.run.seed, step, self.accelerator.process_index]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def row(self, question: Question) -> Row:
        """The question of an item as a row without an output."""
        item = self.data.items[question.item]
        return Row(item.prompt, item.image, question.dimension)

    def sample(self, rows: Sequence[Row], sampling: Sampling, seed: int) -> list[list[Row]]:
        """A group of outputs for each question, sampled with the model in training."""
        with self.accelerator.autocast():
            return sample_outputs(self.core, rows, sampling, seed, self.config.run.micro_batch)

    def outputs(self, rows: Sequence[Row]) -> RowOutputs:
        """Outputs of rows without gradient."""
        return run_rows(self.model, self.core, rows, self.config.run.micro_batch)

    def backward(self, rows: Sequence[Row], loss_of: Callable[[RowOutputs], Tensor]) -> float:
        """Add the gradient of a loss over the outputs of rows; returns the loss.

        Raises:
            ZrewardError: the loss is not finite.
        """
        micro = self.config.run.micro_batch
        pieces = self._most(math.ceil(len(rows) / micro))
        loss = backward(self.model, self.core, rows, micro, loss_of, self.accelerator.backward, pieces)
        if not math.isfinite(loss):
            raise ZrewardError(
                f"the loss is {loss}; lower optimizer.learning_rate, or train in fp32, and run again: the run goes on "
                "from its last state"
            )
        return loss

    def update(self) -> float:
        """One optimizer step with what `backward` added; returns the norm of the gradient before it was clipped."""
        limit = self.config.optimizer.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_([p for _, p in trainable(self.core)], limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def record(self, step: int, **values: float) -> None:
        """Numbers of a step; every `log_every` steps their means over steps and processes become one line."""
        for name, value in values.items():
            self._sums[name].append(value)
        done = step + 1
        if done % self.config.run.log_every and done != self.config.run.steps:
            return
        means = {name: self._mean(entries) for name, entries in self._sums.items()}
        self._sums.clear()
        if self.log is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            self.log.event("step", step=done, learning_rate=rate, **means)

    def validate(self, step: int, answers: Answers) -> None:
        """Score the validation set where the config asks for it after this step."""
        every = self.config.run.validate_every
        if every and (step + 1) % every == 0 and step + 1 < self.config.run.steps:
            self._validated(step + 1, answers)

    def finish(self, answers: Answers) -> dict[str, Any]:
        """Save the trained checkpoint in the folder `model`; returns what its `training.json` says."""
        total = self.config.run.steps
        figures = self._validated(total, answers)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights: Any = get_model_state_dict(self.core, options=options)
        result = {
            "method": self.method,
            "config": self.config.to_dict(),
            "versions": environment(),
            "contract_sha256": self.core.contract.sha256,
            "data_sha256": self.data.sha256,
            "validation_sha256": self.validation.sha256 if self.validation else None,
            "validation": figures,
        }
        if self.log is not None:
            self.log.event("result", step=total, **{k: result[k] for k in ("contract_sha256", "validation")})
            self.log.close()
            source = Checkpoint.open(self.config.model.checkpoint).path
            with staged_directory(self.output / MODEL_FOLDER, replace=False, kind="checkpoint") as staging:
                save_checkpoint(self.config.model, source, weights, staging.path)
                write_json(staging.path / RESULT_FILE, result)
                staging.commit()
        self.accelerator.wait_for_everyone()
        return result

    def _validated(self, step: int, answers: Answers) -> list[dict[str, Any]] | None:
        if self.validation is None:
            return None
        self.model.eval()
        figures = validate(self.validation, answers, self.config.run.validation_items, self._progress)
        self.model.train()
        if self.log is not None:
            self.log.event("validation", step=step, **{row["dimension"]: row for row in figures})
        return figures

    def _most(self, count: int) -> int:
        """The largest of a number over all processes."""
        if self.world == 1:
            return count
        counts: Tensor = self.accelerator.gather(torch.tensor([count], device=self.device))
        return int(counts.max())

    def _mean(self, entries: list[float]) -> float:
        local = torch.tensor([sum(entries), len(entries)], dtype=torch.float64, device=self.device)
        total: Tensor = self.accelerator.reduce(local, reduction="sum")
        return float(total[0] / total[1])

    def _open_log(self) -> TrainingLog | None:
        if not self.is_first_process:
            return None
        log = TrainingLog(self.output, first_step=self.first_step)
        kind = "resume" if self.first_step else "start"
        parameters = {
            "trained": sum(p.numel() for _, p in trainable(self.core)),
            "all": sum(p.numel() for p in self.core.parameters()),
        }
        log.event(
            kind, step=self.first_step, method=self.method, versions=environment(), parameters=parameters
        )
        return log
