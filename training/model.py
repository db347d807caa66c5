"""A checkpoint as the methods train it: loaded, adapted, run, and saved as a checkpoint again.

`RewardModel` runs transformers' modules in one forward pass that returns what losses need and no more: the bins at the
answers and the log-probability of each sampled token. The vocabulary's logits of a whole trace (750 tokens × 248,320,
0.7 GB in float32) are never held at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DynamicCache,
    Qwen3_5ForConditionalGeneration,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from zreward.checkpoint import Checkpoint
from zreward.contract import CONTRACT_FILE, ScoreContract
from zreward.errors import CheckpointError, UsageError
from zreward.prompt import PromptEncoder, load_tokenizer
from zreward.training.config import ModelConfig
from zreward.training.sequences import Batch, Collator
from zreward.training.states import StatesWithGradient
from zreward.training.traces import closed_set

LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""The language model's large linear layers. DeltaNet's gates (in_proj_a and in_proj_b) stay as they are: they are a few
rows, and rounding or low-rank noise in them moves the whole recurrence."""

_TOKEN_CHUNK = 256
"""Positions whose vocabulary logits are held at once: 0.25 GB for Qwen3.5's vocabulary in float32."""

_SHORT_CHUNK = 32
"""Of DeltaNet on a CPU: 0.75 of the time of a step with outputs of 13 tokens."""


StopAfter = Callable[[int], StoppingCriteria]


class Outputs(NamedTuple):
    """What a forward pass returns; a tuple, so that FSDP can see its tensors.

    Attributes:
        bin_log_probs_ak: float32, at each answer of the batch.
        off_scale_a: probability off the codes, without gradient.
        token_log_probs_t: float32, of each token of the outputs.
    """

    bin_log_probs_ak: Tensor
    off_scale_a: Tensor
    token_log_probs_t: Tensor


class RewardModel(nn.Module):
    """A Qwen3.5 model under a contract.

    Attributes:
        net: transformers' model, with LoRA layers in it where there are any.
        collator: makes its batches.
        shares_prefixes: whether rows continue one pass over their prefix. With checkpointing they cannot, since layers
            run again in the backward pass, when the states are gone; with FSDP neither, which lets go of a layer's
            weights after each of its passes.
    """

    def __init__(self, net: Any, collator: Collator, *, shares_prefixes: bool = True) -> None:
        super().__init__()
        self.shares_prefixes = shares_prefixes
        self.net: Any = net  # transformers' own annotations do not cover what its modules are called with
        self.collator = collator
        self.code_ids = list(collator.encoder.code_ids)

    @property
    def contract(self) -> ScoreContract:
        return self.collator.contract

    @property
    def bins(self) -> Tensor:
        """The contract's bins, float32 [k], on the model's device."""
        return torch.tensor(self.contract.bins, device=self.net.device)

    def forward(self, batch: Batch) -> Outputs:
        hidden_bsd = self._continued(batch) if self.shares_prefixes else self._joined(batch)
        answers: Tensor = self.net.lm_head(hidden_bsd[batch.answer_rows_a, batch.answer_positions_a])
        scores = closed_set(answers, batch.codes)
        tokens_td = hidden_bsd[batch.token_rows_t, batch.token_positions_t]
        return Outputs(
            scores.log_probs_nk, scores.off_scale_n, self._token_log_probs(tokens_td, batch.token_ids_t)
        )

    @torch.no_grad()
    def generate(self, batch: Batch, count: int, stop_after: StopAfter, **options: Any) -> list[list[int]]:
        """transformers' generation, `count` times after each row of a batch without outputs.

        A prefix runs once for all that continues it, where prefixes are shared.

        Args:
            stop_after: makes the stopping criterion from the number of ids in front.
            options: of transformers' `generate`.

        Returns:
            The new ids, b · count, those of a row one after the other.
        """
        ids, mask = (part.repeat_interleave(count, 0) for part in batch.left_padded(self.collator.pad_id))
        before: dict[str, Any]
        if self.shares_prefixes:
            before = {"past_key_values": self._states_before_answers(batch, count)}
        else:
            images = [
                image
                for prefix in batch.prefix_of_row_b.tolist()
                for _ in range(count)
                for image in batch.images_of_prefixes[prefix]
            ]
            before = {
                "mm_token_type_ids": self._image_mask(ids),
                "image_grid_thw": batch.grids_i3[images],
                "mm_encoder_outputs": {"image": self._image_features(batch, images)},
            }
        sequences: Tensor = self.net.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=self.collator.pad_id,
            stopping_criteria=StoppingCriteriaList([stop_after(ids.shape[1])]),
            **before,
            **options,
        )
        new: list[list[int]] = sequences[:, ids.shape[1] :].tolist()
        return new

    def _states_before_answers(self, batch: Batch, count: int) -> StatesWithGradient:
        """States after all but the last id of each row, `count` times, for ids padded on the left.

        Questions of one length run together, since no padding may come between a prefix and its answer.
        """
        prefixes = StatesWithGradient(config=self.net.config)
        self._run_prefixes(batch, prefixes)
        deltas_u1: Tensor = self.net.model.rope_deltas
        lengths_b = batch.mask_bs.sum(1)
        parts, order = [], []
        for length in lengths_b.unique().tolist():
            rows = (lengths_b == length).nonzero()[:, 0]
            states = prefixes.of_rows(batch.prefix_of_row_b[rows])
            ids = batch.ids_bs[rows, : length - 1]
            self.net.model(
                input_ids=ids,
                attention_mask=batch.joined_mask[rows, : batch.prefix_ids_ul.shape[1] + length - 1],
                position_ids=batch.positions_3bs[:, rows, : length - 1],
                past_key_values=states,
                use_cache=True,
                **self._chunks(ids),
            )
            parts.append(states)
            order.append(rows)
        place_of_row = torch.cat(order).argsort().repeat_interleave(count)
        self.net.model.rope_deltas = deltas_u1[batch.prefix_of_row_b.repeat_interleave(count)]
        return StatesWithGradient.joined(parts).of_rows(place_of_row)

    def _continued(self, batch: Batch) -> Tensor:
        """Hidden states [b, s, d] of the rows, each from the states of its prefix, which ran once."""
        cache: Any = StatesWithGradient(config=self.net.config)
        self._run_prefixes(batch, cache)
        cache.reorder_cache(batch.prefix_of_row_b)
        hidden: Tensor = self.net.model(
            input_ids=batch.ids_bs,
            attention_mask=batch.joined_mask,
            position_ids=batch.positions_3bs,
            past_key_values=cache,
            use_cache=True,
            **self._chunks(batch.ids_bs),
        ).last_hidden_state
        return hidden

    def _run_prefixes(self, batch: Batch, cache: DynamicCache) -> None:
        """Fill a cache with the states of the batch's prefixes."""
        images = [image for seen in batch.images_of_prefixes for image in seen]
        self.net.model(
            input_ids=batch.prefix_ids_ul,
            attention_mask=batch.prefix_mask_ul,
            mm_token_type_ids=self._image_mask(batch.prefix_ids_ul),
            image_grid_thw=batch.grids_i3[images],
            mm_encoder_outputs={"image": self._image_features(batch, images)},
            past_key_values=cache,
            use_cache=True,
            **self._chunks(batch.prefix_ids_ul),
        )

    def _joined(self, batch: Batch) -> Tensor:
        """The same hidden states from whole sequences, prefix and row in one."""
        images = batch.images_of_rows()
        ids = batch.joined_ids
        hidden: Tensor = self.net.model(
            input_ids=ids,
            attention_mask=batch.joined_mask,
            mm_token_type_ids=self._image_mask(ids),
            image_grid_thw=batch.grids_i3[images],
            mm_encoder_outputs={"image": self._image_features(batch, images)},
            use_cache=False,
            **self._chunks(ids),
        ).last_hidden_state
        return hidden[:, -batch.ids_bs.shape[1] :]

    def _chunks(self, ids: Tensor) -> dict[str, int]:
        """Tokens that DeltaNet takes at a time where torch computes it: it fills rows up to whole chunks, of 64 if it
        is not told, and a short output would be mostly filling."""
        short = ids.device.type == "cpu" and ids.shape[1] <= 8 * _SHORT_CHUNK
        return {"chunk_size": _SHORT_CHUNK} if short else {}

    def _image_mask(self, ids: Tensor) -> Tensor:
        """1 at image placeholders, int32 as `ids`: transformers computes positions from it."""
        return (ids == self.collator.encoder.image_token_id).int()

    def _image_features(self, batch: Batch, images: Sequence[int]) -> BaseModelOutputWithPooling:
        """Every image once through the vision tower, then repeated as `images` says."""
        encoded = self.net.model.get_image_features(batch.pixel_values, batch.grids_i3, return_dict=True)
        of_rows = tuple(encoded.pooler_output[image] for image in images)
        return BaseModelOutputWithPooling(pooler_output=of_rows)  # type: ignore[arg-type]  # one tensor an image

    def _token_log_probs(self, hidden_td: Tensor, ids_t: Tensor) -> Tensor:
        if not len(ids_t):
            return hidden_td.new_zeros(0, dtype=torch.float32)
        parts = [
            checkpoint(self._chunk_log_probs, hidden, ids, use_reentrant=False)
            for hidden, ids in zip(hidden_td.split(_TOKEN_CHUNK), ids_t.split(_TOKEN_CHUNK), strict=True)
        ]
        return torch.cat(parts)

    def _chunk_log_probs(self, hidden_td: Tensor, ids_t: Tensor) -> Tensor:
        logits_tv: Tensor = self.net.lm_head(hidden_td).float()
        chosen = logits_tv.gather(1, ids_t[:, None])[:, 0]
        return chosen - logits_tv.logsumexp(-1)


def load_model(config: ModelConfig, device: torch.device) -> RewardModel:
    """Open a checkpoint for training on a device.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of another architecture, or its contract does not fit.
        UsageError: the config asks for what this machine or an extra that is not installed would be needed for.
    """
    source = Checkpoint.open(config.checkpoint)
    contract = contract_of(source, config)
    _quiet_libraries()
    encoder = PromptEncoder(contract, load_tokenizer(source.path))
    net: Any = Qwen3_5ForConditionalGeneration.from_pretrained(
        source.path, dtype=weight_dtype(config, device), **_quantized(config, device)
    )
    if not config.quantize:
        net = net.to(device)
    net.requires_grad_(config.lora_rank == 0)
    if config.lora_rank:
        net = _with_lora(net, config)
    if not config.train_vision:
        net.model.visual.requires_grad_(False)
    if config.gradient_checkpointing:
        net.enable_input_require_grads()
        net.activation_checkpointing_enable({"use_reentrant": False})
    pad = net.config.get_text_config().pad_token_id
    collator = Collator(contract, encoder, pad if pad is not None else 0)
    return RewardModel(net, collator, shares_prefixes=not config.gradient_checkpointing)


def runs_in_bfloat16(config: ModelConfig, device: torch.device) -> bool:
    """Where it is asked for, or where "auto" meets a GPU."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type != "cpu")


def weight_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Weights that learn stay in float32, as a step is often smaller than bfloat16 resolves; frozen ones need not."""
    return torch.bfloat16 if config.lora_rank and runs_in_bfloat16(config, device) else torch.float32


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def banned_ids(net: Any) -> list[int]:
    """Ids that no trace may contain: an image or video token would be read as a place for pixels."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    found = (getattr(net.config, name, None) for name in names)
    return sorted({int(token) for token in found if token is not None})


def contract_of(source: Checkpoint, config: ModelConfig) -> ScoreContract:
    """The contract beside the weights, or the one that the config names for weights without one.

    Raises:
        ContractError, CheckpointError: it is missing, malformed, or does not fit the model.
        UsageError: the config names another one than the checkpoint was trained under.
    """
    if config.contract is None:
        return source.contract()
    contract = ScoreContract.load(Path(config.contract))
    beside = source.path / CONTRACT_FILE
    if beside.is_file() and ScoreContract.load(beside).sha256 != contract.sha256:
        raise UsageError(
            f"{config.contract}: another contract than the one that {source.path} was trained under "
            f"({beside}); remove `contract` from [model], or train from a checkpoint that has none"
        )
    return contract


def _quiet_libraries() -> None:
    """They draw bars of their own and advise packages for GPUs, which docs/training.md does once."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _quantized(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights that stay quantized while training."""
    if config.quantize is None:
        return {}
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if runs_in_bfloat16(config, device) else torch.float32
    skipped = ["visual", "lm_head", "in_proj_a", "in_proj_b"]
    if config.quantize == "nf4":
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    else:
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return {"quantization_config": options, "device_map": {"": device}}


def _with_lora(net: Any, config: ModelConfig) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=config.lora_dropout,
        target_modules=r".*language_model\..*\.(" + "|".join(LORA_TARGETS) + ")",
    )
    adapted = inject_adapter_in_model(lora, net)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def check_same_contract(ours: ScoreContract, theirs: ScoreContract, path: str) -> None:
    """A teacher and its student answer the same questions on the same scale, or nothing can be compared.

    Raises:
        CheckpointError: bins or dimensions differ.
    """
    if ours.bins != theirs.bins or ours.dimension_names != theirs.dimension_names:
        raise CheckpointError(
            f"{path}: its contract has the dimensions {', '.join(theirs.dimension_names)} on {len(theirs.bins)} bins, "
            f"and the model in training {', '.join(ours.dimension_names)} on {len(ours.bins)}"
        )


def freeze(model: RewardModel) -> RewardModel:
    """A model that is asked and never trained."""
    model.requires_grad_(False)
    return model.eval()


def scores_of(log_probs_nk: Tensor, bins: Sequence[float]) -> list[float]:
    """Expectations as plain numbers."""
    values: list[float] = (log_probs_nk.double().exp() @ torch.tensor(bins, dtype=torch.float64)).tolist()
    return values
