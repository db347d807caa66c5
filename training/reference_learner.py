"""The reference student while it learns: its modules, its start, its batches, and how it is saved."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5ForConditionalGeneration

from zreward.contract import ScoreContract
from zreward.errors import CheckpointError
from zreward.prompt import PromptEncoder
from zreward.synthetic import SceneConfig, make_scene
from zreward.training.reference_data import SceneArrays, length_batches
from zreward.training.reference_evaluate import fit_temperatures
from zreward.training.reference_forward import ServingForm, patches_from_images, vision_features
from zreward.training.reference_losses import AuxiliaryHeads
from zreward.training.reference_model import (
    PATCH,
    TOKEN_SIDE,
    reference_contract,
    save_tokenizer,
    student_config,
    train_tokenizer,
)
from zreward.training.reference_recipe import TOKENIZER_SEED, Recipe

_TIED = "lm_head.weight"


class Student:
    """A model in training with its contract, encoder and auxiliary heads.

    `more_texts` are further ones that its tokenizer is trained on.
    """

    def __init__(self, recipe: Recipe, more_texts: Iterable[str] = ()) -> None:
        torch.manual_seed(recipe.seed)
        self.contract = reference_contract(recipe.shape.image_size)
        texts = itertools.chain(tokenizer_texts(recipe, self.contract), more_texts)
        self.tokenizer = train_tokenizer(texts, recipe.shape.vocabulary)
        self.encoder = PromptEncoder(self.contract, self.tokenizer)
        self.model = Qwen3_5ForConditionalGeneration(student_config(recipe.shape, self.tokenizer))
        initialize_memory(self.model)
        add_fine_filters(self.model)
        self.heads = AuxiliaryHeads(recipe.shape.hidden)
        self.form = ServingForm(self.model, self.encoder, recipe.shape.image_size // TOKEN_SIDE)
        self.grid = recipe.shape.image_size // PATCH

    def features(self, images: NDArray[np.uint8]) -> Tensor:
        """Image tokens [b, t, d] of uint8 images [b, size, size, 3]."""
        patches = patches_from_images(torch.from_numpy(images), self.contract.image)
        return vision_features(self.model, patches, self.grid)

    def save_parts(self, path: Path) -> None:
        """Everything that a later stage continues from, in float32."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors.pop(f"model.{_TIED}")  # the same storage as the embeddings
        tensors |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        partial.replace(path)

    def load_parts(self, path: Path) -> None:
        """Continue from what `save_parts` wrote.

        Raises:
            CheckpointError: the file is of a student with other sizes.
        """
        tensors = load_file(path)
        for prefix, module in (("model.", self.model), ("heads.", self.heads)):
            own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            try:
                missing, unexpected = module.load_state_dict(own, strict=False)
            except RuntimeError as error:
                raise CheckpointError(f"{path} is of another student ({error}); use another --work") from None
            if unexpected or set(missing) - {_TIED}:
                raise CheckpointError(f"{path} is of another student; use another --work directory")


class Prompts:
    """The token ids of every prompt of a split, made once."""

    def __init__(self, encoder: PromptEncoder, data: SceneArrays) -> None:
        texts, self._index = np.unique(data.prompts, return_inverse=True)
        self._index = self._index.reshape(data.prompts.shape)
        self._ids = [encoder.text_prefix_ids(str(text)) for text in texts]
        self.lengths = np.array([len(ids) for ids in self._ids])[self._index]

    def batch(self, rows: NDArray[np.int64], which: NDArray[np.int64]) -> Tensor:
        """Ids [b, l] of equally long prompts."""
        return torch.from_numpy(np.stack([self._ids[k] for k in self._index[rows, which]]))


class PairStream:
    """Endless batches of (image, prompt) with equally long prompts; other prompts for half of them."""

    def __init__(
        self, rng: np.random.Generator, data: SceneArrays, prompts: Prompts, batch: int, n_images: int
    ) -> None:
        self._rng, self._data, self._prompts, self._batch = rng, data, prompts, batch
        self._n_images = n_images
        self._queue: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._limit = 0

    def next(self, max_asked: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and which of their prompts, none of which asks for more than `max_asked` objects."""
        if max_asked != self._limit:
            self._limit, self._queue = max_asked, []
        while not self._queue:
            self._refill()
        return self._queue.pop()

    def _refill(self) -> None:
        data, rng = self._data, self._rng
        rows = rng.choice(self._n_images, size=min(self._n_images, 128 * self._batch), replace=False)
        which = rng.integers(data.prompts.shape[1], size=len(rows))
        which[rng.random(len(rows)) < 0.3] = 0
        allowed = data.asked[rows, which] <= self._limit
        rows, which = rows[allowed], which[allowed]
        batches = length_batches(rng, self._prompts.lengths[rows, which], self._batch)
        self._queue = [(rows[b], which[b]) for b in batches if len(b) >= min(8, len(rows))]


def initialize_memory(model: Qwen3_5ForConditionalGeneration) -> None:
    """Let Gated DeltaNet remember from the start: time steps log-uniform in 0.001 to 0.1, as in its paper.

    transformers starts every time step at softplus(1) = 1.3, for checkpoints that overwrite it. Then a
    typical head forgets all but the last token, and no gradient tells it what it could have remembered.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("linear_attn.dt_bias"):
            steps = torch.exp(torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)))
            with torch.no_grad():
                parameter.copy_(steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus


def add_fine_filters(model: Qwen3_5ForConditionalGeneration, gain: float = 0.03) -> None:
    """Add random high-pass filters to the patch embedding, which leave smooth areas as they are.

    Noise, blur and compression live in fine detail, a small part of a patch's energy: from the usual start
    a tower had not noticed them after 40,000 images.
    """
    with torch.no_grad():
        weight = model.model.visual.patch_embed.proj.weight
        luma = gain * torch.randn(weight.shape[0], 1, PATCH, PATCH)
        fine = luma - nn.functional.avg_pool2d(luma, 5, stride=1, padding=2, count_include_pad=False)
        weight += (fine - fine.mean(dim=(2, 3), keepdim=True))[:, :, None]


def tokenizer_texts(recipe: Recipe, contract: ScoreContract) -> Iterator[str]:
    """The contract's own text, and prompts of scenes that no split contains."""
    template = contract.template
    for _ in range(20):  # often enough that every word of the contract becomes one token
        yield template.before_image.replace("{system}", contract.system_text).replace("{prompt}", "")
        for dimension in contract.dimensions:
            yield template.question.replace("{question}", dimension.question)
    yield from _prompts(recipe.scenes, TOKENIZER_SEED + recipe.seed)


@functools.cache
def _prompts(scenes: SceneConfig, seed: int) -> tuple[str, ...]:
    """Those of 600 scenes, drawn small since nobody looks at them."""
    small = dataclasses.replace(scenes, size=48)
    return tuple(make_scene(small, seed, index, candidates=1).prompt for index in range(600))


@torch.inference_mode()
def cached_features(student: Student, images: NDArray[np.uint8]) -> Tensor:
    """Image tokens of a whole split, float16 [N, t, d]."""
    batches = [student.features(images[start : start + 256]).half() for start in range(0, len(images), 256)]
    return torch.cat(batches).clone()


@torch.inference_mode()
def predict(student: Student, data: SceneArrays, features: Tensor) -> NDArray[np.float64]:
    """Score logits [N, q, bins] of every image under its own prompt."""
    prompts = Prompts(student.encoder, data)
    logits = np.zeros((len(data), len(student.contract.dimensions), len(student.contract.bins)))
    for rows in length_batches(np.random.default_rng(0), prompts.lengths[:, 0], 128):
        answers = student.form(prompts.batch(rows, np.zeros_like(rows)), features[rows].float())
        logits[rows] = answers.logits_bqk.double().numpy()
    return logits


def round_to_bfloat16(model: nn.Module) -> None:
    """What saving will do to the weights, done first, so that everything measured is what ships."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def save_student(
    student: Student, out: Path, logits: NDArray[np.float64], validation: SceneArrays
) -> ScoreContract:
    """Write the checkpoint directory; returns its contract with temperatures fitted on `logits`."""
    contract = student.contract.with_temperatures(fit_temperatures(logits, validation, student.contract))
    rounded = Qwen3_5ForConditionalGeneration(student.model.config)
    rounded.load_state_dict(student.model.state_dict())
    rounded.bfloat16().save_pretrained(out)
    save_tokenizer(student.tokenizer, out)
    contract.save(out)
    return contract
