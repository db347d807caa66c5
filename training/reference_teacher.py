"""A teacher of the reference student: a model that can say what it sees, made from one that only grades.

A student's tokenizer knows the words of prompts and questions. `with_words` gives a checkpoint another tokenizer whose
pieces include the words of descriptions (`zreward.synthetic.descriptions`); `grown` adds layers that change nothing at
first; `learn_chains` teaches descriptions and the scores after them, by `zreward train rewarddance`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3_5ForConditionalGeneration

from zreward.progress import Progress
from zreward.prompt import load_tokenizer
from zreward.staging import staged_directory
from zreward.synthetic import SceneConfig, make_scene
from zreward.synthetic.benchmark import CHAINS_FILE
from zreward.synthetic.dataset import SCENES_FILE
from zreward.synthetic.descriptions import describe
from zreward.training import rewarddance
from zreward.training.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from zreward.training.reference_learner import Student
from zreward.training.reference_model import save_tokenizer
from zreward.training.reference_recipe import Recipe

MAX_NEW_TOKENS = 48
"""Of a description with its score; the longest has three objects drawn and three asked for."""

_TEXTS_SEED = 17_000
_EMBEDDINGS = "model.language_model.embed_tokens.weight"
_ADDS_TO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
"""The last product of each half of a layer; where it is 0, the layer hands on what it was given."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A run of `learn_chains`.

    Attributes:
        steps, batch: how many, and images in each.
        rate: the highest learning rate.
        score_weight: of the scores after the chains; 0 leaves them out, for data without labels.
    """

    steps: int
    batch: int
    rate: float
    score_weight: float


@functools.cache
def description_texts(scenes: SceneConfig) -> tuple[str, ...]:
    """Descriptions of 300 scenes that no split has, for the tokenizer; drawn small since nobody looks at them."""
    small = dataclasses.replace(scenes, size=48)
    drawn = (make_scene(small, _TEXTS_SEED, index, candidates=1) for index in range(300))
    return tuple(text for scene in drawn for text in describe(scene.candidates[0], scene.spec).values())


def with_words(recipe: Recipe, start: Path) -> Student:
    """A checkpoint that has the words of descriptions among its tokens, and more layers on top if `recipe` has them.

    A token that `start` does not have begins as the mean of the pieces that it is written with there. A layer changes
    nothing until it learns.

    Args:
        recipe: of the same widths as `start`.
    """
    student = Student(recipe, description_texts(recipe.scenes))
    weights = {name: value.float() for name, value in load_file(start / "model.safetensors").items()}
    weights[_EMBEDDINGS] = _embeddings(weights[_EMBEDDINGS], load_tokenizer(start), student.tokenizer)
    _pass_on_at_first(student.model, weights)
    load_weights(student.model, weights)
    return student


def grown(recipe: Recipe, start: Path) -> Student:
    """A checkpoint of `recipe`'s tokenizer with more layers on top, which change nothing until they learn."""
    student = Student(recipe, description_texts(recipe.scenes))
    known = load_file(start / "model.safetensors")
    _pass_on_at_first(student.model, known)
    load_weights(student.model, known)
    return student


def load_weights(model: Qwen3_5ForConditionalGeneration, weights: dict[str, Tensor]) -> None:
    """Set some of a model's weights.

    Raises:
        ValueError: the model has no such weight.
    """
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        layers = len(model.model.language_model.layers)
        raise ValueError(f"{unexpected[0]} has no place in a model of {layers} layers")


def save_start(student: Student, directory: Path) -> None:
    """Write a checkpoint that a run can start from, in float32."""
    with staged_directory(directory, replace=False, kind="checkpoint") as staging:
        student.model.save_pretrained(staging.path)
        save_tokenizer(student.tokenizer, staging.path)
        student.contract.save(staging.path)
        staging.commit()


def learn_chains(
    lesson: Lesson,
    run: Path,
    start: Path,
    split: Path,
    *,
    precision: str,
    micro_batch: int,
    threads: int | None,
    progress: Progress,
) -> Path:
    """The checkpoint of a run on the chains of a split, unless it is there.

    Args:
        run: its folder.
        start: checkpoint.
        split: folder of a data set with chains (`zreward.synthetic.benchmark`).
        micro_batch: sequences in one pass.
    """
    if not (run / "model").is_dir():
        rewarddance.train(
            TrainConfig(
                DataConfig(str(split / SCENES_FILE)),
                ModelConfig(str(start), precision=precision),
                RunConfig(
                    str(run),
                    steps=lesson.steps,
                    batch_size=lesson.batch,
                    micro_batch=micro_batch,
                    save_every=200,
                    log_every=20,
                    threads=threads,
                ),
                OptimizerConfig(
                    learning_rate=lesson.rate,
                    betas=(0.9, 0.98),
                    weight_decay=0.05,
                    warmup_steps=lesson.steps // 20,
                ),
                {
                    "chains": str(split / CHAINS_FILE),
                    "score_weight": lesson.score_weight,
                    "max_new_tokens": MAX_NEW_TOKENS,
                },
            ),
            progress,
        )
    return run / "model"


def shown(name: str) -> Progress:
    """Progress on stderr, a line every tenth."""
    seen: set[tuple[str, int]] = set()

    def progress(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if (stage, tenth) not in seen:
            seen.add((stage, tenth))
            print(f"{name}: {stage} {done:,} of {total:,}", file=sys.stderr, flush=True)

    return progress


def _embeddings(known_vd: Tensor, old: Tokenizer, new: Tokenizer) -> Tensor:
    """Rows of `known_vd` for the tokens of another tokenizer."""
    added = new.get_added_tokens_decoder()
    rows = []
    for number in range(new.get_vocab_size()):
        piece = added[number].content if number in added else new.id_to_token(number)
        same = old.token_to_id(piece or "")
        pieces = [same] if same is not None else old.encode(new.decode([number])).ids
        rows.append(known_vd[pieces].mean(0))
    return torch.stack(rows)


@torch.no_grad()
def _pass_on_at_first(model: Qwen3_5ForConditionalGeneration, known: dict[str, Tensor]) -> None:
    """Let every layer that `known` has no weights of hand on what it is given, until it has learned."""
    for name, parameter in model.named_parameters():
        if name not in known and name.endswith(_ADDS_TO_RESIDUAL):
            parameter.zero_()
