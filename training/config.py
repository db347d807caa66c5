"""What a training run is told: one TOML file, strictly read, saved beside the weights as it was used.

    [data]       files
    [model]      the checkpoint to start from, and which of its weights learn in what precision
    [optimizer]
    [run]        where to, how long, how often
    [method]     what only this method has: its fields are the dataclass in the method's own file

Paths are relative to the file. An unknown key is an error that lists the known ones. Where the paper leaves a value
open, the default has a reason beside it.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from zreward.errors import UsageError
from zreward.jsonfile import dataclass_from_json

M = TypeVar("M")

SECTIONS = ("data", "model", "optimizer", "run", "method")


@dataclass(frozen=True)
class DataConfig:
    """Files of a run.

    Attributes:
        train: JSONL data set (`zreward.training.data`).
        validation: held-out data set; without one nothing is validated.
        pairs: chosen pairs by id for the methods that learn from pairs; all same-prompt pairs otherwise.
    """

    train: str
    validation: str | None = None
    pairs: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Where a run starts and which weights learn.

    Attributes:
        checkpoint: directory, or `owner/name` on the hub.
        contract: another contract than the one beside the weights, as a path; with a checkpoint that has none.
        precision: of the computation: "fp32", "bf16", or "auto" for bf16 on a GPU and fp32 on a CPU.
        lora_rank: 0 trains all weights; otherwise only low-rank additions to the language model's linear layers, which
            are merged into the weights at the end. 9B in full needs 16 bytes a parameter, with LoRA 2.
        lora_alpha: the additions are scaled by `lora_alpha / lora_rank`.
        lora_dropout: of the additions' inputs.
        quantize: "nf4" or "int8" keeps the frozen weights in that form while training (QLoRA); needs LoRA.
        train_vision: whether the vision tower learns. Without it, rubrics that need new seeing do not improve, and
            memory is saved; the paper does not say.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
    """

    checkpoint: str
    contract: str | None = None
    precision: str = "auto"
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    quantize: str | None = None
    train_vision: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _one_of("model.precision", self.precision, ("auto", "fp32", "bf16"))
        _one_of("model.quantize", self.quantize, (None, "nf4", "int8"))
        _at_least("model.lora_rank", self.lora_rank, 0)
        _within("model.lora_dropout", self.lora_dropout, 0, 0.99)
        if self.lora_alpha <= 0:
            raise UsageError(f"model.lora_alpha must be > 0, not {self.lora_alpha:g}")
        if self.quantize and not self.lora_rank:
            raise UsageError(
                f"model.quantize = {self.quantize!r} freezes the weights, so it needs model.lora_rank > 0"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        name: "adamw", or "adamw8bit" with its state in 8 bits (bitsandbytes, on a GPU).
        learning_rate: peak. 1e-4 suits LoRA; take 1e-5 for all weights of a pretrained model.
        betas: 0.95 rather than 0.999 for the second moment, whose memory should be shorter than a run of a few hundred
            steps.
        weight_decay: of matrices; vectors have none.
        warmup_steps: the rate grows linearly over these.
        schedule: after them "constant", "linear" to 0, or "cosine" to 0.
        clip_norm: largest norm of the gradient; 0 leaves it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup_steps: int = 20
    schedule: str = "cosine"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("adamw", "adamw8bit"))
        _one_of("optimizer.schedule", self.schedule, ("constant", "linear", "cosine"))
        _at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        _within("optimizer.learning_rate", self.learning_rate, 0, 1)
        _within("optimizer.weight_decay", self.weight_decay, 0, 1)
        _within("optimizer.clip_norm", self.clip_norm, 0, float("inf"))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optimizer.betas must be two numbers from 0 to below 1, not {self.betas}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how long it goes on, and how often it looks around.

    Attributes:
        output: directory of the run; the trained checkpoint is its folder `model`.
        steps: optimizer steps. Batches are drawn epoch by epoch, each in an order of its own.
        batch_size: what the method counts in one step, over all processes: images for sft, rewarddance and
            risd, whose questions share them, pairs for grpo and gdso, questions for opd.
        micro_batch: sequences in one pass through the model; smaller needs less memory and gives the same gradient.
            Multiples of the number of dimensions, or of a group, keep those that share an image together.
        seed: of the order, of added weights and of sampling.
        save_every: steps between resumable checkpoints, 0 for none.
        keep: how many of those stay on disk.
        log_every: steps between lines of the log.
        validate_every: steps between validations, 0 for one at the end.
        validation_items: how many items of the validation set are scored, from its beginning; 0 for all.
        shard: with several processes, split weights, gradients and optimizer memory over them (FSDP).
        threads: of the CPU, None as torch has it.
    """

    output: str
    steps: int
    batch_size: int = 16
    micro_batch: int = 8
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    validate_every: int = 0
    validation_items: int = 0
    shard: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, low in _RUN_MINIMA.items():
            _at_least(f"run.{name}", getattr(self, name), low)
        if self.threads is not None:
            _at_least("run.threads", self.threads, 1)


_RUN_MINIMA = {
    "steps": 1,
    "batch_size": 1,
    "micro_batch": 1,
    "seed": 0,
    "save_every": 0,
    "keep": 1,
    "log_every": 1,
    "validate_every": 0,
    "validation_items": 0,
}


@dataclass(frozen=True)
class TrainConfig:
    """The whole file; `method` is still a plain object, read by the method's own dataclass (`method_options`)."""

    data: DataConfig
    model: ModelConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    method: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def method_options(self, kind: type[M]) -> M:
        """The `[method]` section as the dataclass of a method.

        Raises:
            UsageError: a key is unknown, missing or of the wrong type.
        """
        return dataclass_from_json(kind, self.method, "[method]", UsageError)


def load_config(path: Path) -> TrainConfig:
    """Read a TOML file; relative paths in it become absolute.

    Raises:
        UsageError: there is no such file, it is not TOML, or a section or key is unknown, missing or of the wrong type.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such config; docs/training.md has one for every method")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from None
    for name in ("data", "model", "run"):
        if name not in data:
            raise UsageError(f"{path}: the section [{name}] is missing; known are {', '.join(SECTIONS)}")
    for section, keys in _PATHS.items():
        values = data.get(section)
        if isinstance(values, dict):
            values.update({key: _absolute(key, values[key], path.parent) for key in keys if key in values})
    return dataclass_from_json(TrainConfig, data, str(path), UsageError)


_PATHS = {
    "data": ("train", "validation", "pairs"),
    "model": ("checkpoint", "contract"),
    "run": ("output",),
    "method": ("teacher", "chains"),
}
_MODELS = ("checkpoint", "teacher")


def _absolute(key: str, value: Any, folder: Path) -> Any:
    """A path from `folder`; a model's name on the hub stays as it is."""
    if not isinstance(value, str):
        return value
    path = folder / value
    is_name = key in _MODELS and re.fullmatch(r"\w[\w.-]*/[\w.-]+", value) and not path.parent.exists()
    return value if is_name else str(path.resolve())


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        options = ", ".join(repr(item) for item in known if item is not None)
        raise UsageError(f"{name} must be one of {options}, not {value!r}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise UsageError(f"{name} must be at least {low}, not {value}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} must be from {low:g} to {high:g}, not {value:g}")
