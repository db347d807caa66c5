"""Training-time forward passes of the reference student, equal to transformers' and several times faster.

transformers' own pass attends to images one at a time, recomputes the constant system text for every
row and, without CUDA packages, solves a triangular system per chunk for Gated DeltaNet. Training runs
the same modules in the serving form instead: the system text once, then prompt and image, then the four
questions as rows of their own from the repeated states, and of the last layer only the position that is
read. Tests hold both towers equal to transformers.

Shape suffixes: b batch, t image tokens, p patches, e patch elements, y and x pixels, l sequence, d width,
h heads, c channels, q questions, k bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from zreward.image import ImageSpec
from zreward.prompt import PromptEncoder, image_positions, text_positions
from zreward.training.reference_model import MERGE


def patches_from_images(images_byxc: Tensor, spec: ImageSpec) -> Tensor:
    """uint8 [B, H, W, 3] to normalized patches [B, P, 3·patch²] of one frame, in the tower's order."""
    batch, height, width, _ = images_byxc.shape
    patch, merge = spec.patch_size, spec.merge_size
    rows, columns = height // (patch * merge), width // (patch * merge)
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    pixels = (images_byxc.float() / 255.0 - mean) / std
    blocks = pixels.view(batch, rows, merge, patch, columns, merge, patch, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns * merge * merge, -1)


def vision_features(model: Qwen3_5ForConditionalGeneration, patches_bpe: Tensor, grid: int) -> Tensor:
    """The vision tower on a batch of equal square images.

    Args:
        patches_bpe: from `patches_from_images`; both frames of the tower's patches are this one.
        grid: patches per side; must be the side of the learned position grid, so nothing is resampled.

    Returns:
        [B, T, D], what transformers scatters into the image placeholders.
    """
    visual = model.model.visual
    kernel = visual.patch_embed.proj
    hidden = F.linear(patches_bpe, kernel.weight.sum(dim=2).flatten(1), kernel.bias)
    rows_columns = get_vision_position_ids(torch.tensor([[1, grid, grid]]), MERGE)
    hidden = hidden + visual.pos_embed.weight[rows_columns @ torch.tensor([grid, 1])]
    rotary = visual.rotary_pos_emb(hidden, rows_columns)
    for block in visual.blocks:
        hidden = hidden + _vision_attention(block.attn, block.norm1(hidden), rotary)
        hidden = hidden + block.mlp(block.norm2(hidden))
    batch, patches, _ = hidden.shape
    tokens: Tensor = visual.merger(hidden.reshape(batch * patches, -1))
    return tokens.view(batch, patches // MERGE**2, -1)


@dataclass(frozen=True)
class DeltaState:
    """Gated DeltaNet after a segment: the last inputs of the convolution and the fp32 memory."""

    conv_blc: Tensor
    memory_bhdd: Tensor


@dataclass(frozen=True)
class AttentionState:
    """Keys and values of a full-attention layer after a segment."""

    keys_bhld: Tensor
    values_bhld: Tensor


State = DeltaState | AttentionState


def decode_segment(
    model: Qwen3_5ForConditionalGeneration,
    embeds_bld: Tensor,
    positions_3bl: Tensor,
    states: Sequence[State] | None = None,
    *,
    read_last: bool = False,
) -> tuple[Tensor, list[State]]:
    """Run one segment of equally long rows through the decoder, continuing from `states`.

    Returns:
        The input of the last layer [B, L, D], or with `read_last` the normalized output of the last
        position [B, D]; and the states after the segment.
    """
    decoder = model.model.language_model
    hidden = embeds_bld
    rotary = decoder.rotary_emb(hidden, positions_3bl)
    after: list[State] = []
    for index, layer in enumerate(decoder.layers):
        is_last = index == len(decoder.layers) - 1
        before = states[index] if states is not None else None
        normed = layer.input_layernorm(hidden)
        mixed, state = _mixed(layer, normed, rotary, before, last_only=is_last)
        after.append(state)
        if is_last and not read_last:
            break
        hidden = (hidden[:, -1:] if is_last else hidden) + (mixed[:, -1:] if is_last else mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return (decoder.norm(hidden[:, -1]) if read_last else hidden), after


def _mixed(
    layer: Any, normed_bld: Tensor, rotary: tuple[Tensor, Tensor], before: State | None, *, last_only: bool
) -> tuple[Tensor, State]:
    """The token mixer of one decoder layer, whichever it is."""
    if hasattr(layer, "linear_attn"):
        assert before is None or isinstance(before, DeltaState)
        return _delta_net(layer.linear_attn, normed_bld, before)
    assert before is None or isinstance(before, AttentionState)
    return _attention(layer.self_attn, normed_bld, rotary, before, last_only=last_only)


@dataclass(frozen=True)
class Answers:
    """One forward pass over a batch of prompt-image pairs.

    Attributes:
        logits_bqk: of the score codes, for every question that was asked.
        reads_bqd: the normalized hidden states they were read from.
        image_btd: the image tokens' hidden states before the last layer.
    """

    logits_bqk: Tensor
    reads_bqd: Tensor
    image_btd: Tensor


class ServingForm:
    """Looks once and asks every question: the training-time forward pass of one student and contract."""

    def __init__(self, model: Qwen3_5ForConditionalGeneration, encoder: PromptEncoder, side: int) -> None:
        self.model = model
        self.side = side
        self.code_ids = list(encoder.code_ids)
        self.after_image = torch.from_numpy(encoder.image_span_ids(0))
        self.questions_ql = torch.from_numpy(np.stack(encoder.question_ids))
        first, second = encoder.text_prefix_ids("a"), encoder.text_prefix_ids("two")
        shortest = min(len(first), len(second))
        different = np.flatnonzero(first[:shortest] != second[:shortest])
        self.n_shared = int(different[0]) if len(different) else shortest
        self.shared = torch.from_numpy(first[: self.n_shared])

    def __call__(
        self, prompts_bl: Tensor, image_btd: Tensor, questions: Sequence[int] | None = None
    ) -> Answers:
        """Answers for equally long text prefixes (whole, as `text_prefix_ids` gives them) and images.

        Args:
            questions: which of the contract's questions to ask; all of them by default.
        """
        embed = self.model.model.language_model.embed_tokens
        batch, tokens, _ = image_btd.shape
        own = prompts_bl[:, self.n_shared :]
        _, states = decode_segment(self.model, embed(self.shared)[None], _text_3bl(0, self.n_shared))
        closing = embed(self.after_image).expand(batch, -1, -1)
        positions, following = self._image_segment_positions(own.shape[1])
        hidden, states = decode_segment(
            self.model,
            torch.cat([embed(own), image_btd, closing], dim=1),
            positions.expand(-1, batch, -1),
            [_repeated(state, batch) for state in states],
        )
        asked = self.questions_ql if questions is None else self.questions_ql[list(questions)]
        n_questions, length = asked.shape
        read, _ = decode_segment(
            self.model,
            embed(asked).repeat(batch, 1, 1),
            _text_3bl(following, length).expand(-1, batch * n_questions, -1),
            [_repeated(state, n_questions) for state in states],
            read_last=True,
        )
        reads = read.view(batch, n_questions, -1)
        logits = F.linear(reads, self.model.lm_head.weight[self.code_ids])
        return Answers(logits, reads, hidden[:, own.shape[1] : own.shape[1] + tokens])

    def _image_segment_positions(self, n_own: int) -> tuple[Tensor, int]:
        start = self.n_shared + n_own
        image, after = image_positions(start, self.side, self.side)
        parts = [text_positions(self.n_shared, n_own), image, text_positions(after, 1)]
        return torch.from_numpy(np.concatenate(parts, axis=1))[:, None], after + 1


def _text_3bl(start: int, length: int) -> Tensor:
    return torch.from_numpy(text_positions(start, length))[:, None]


def _repeated(state: State, times: int) -> State:
    """Each row `times` times, next to each other."""
    if isinstance(state, DeltaState):
        return DeltaState(_rows(state.conv_blc, times), _rows(state.memory_bhdd, times))
    return AttentionState(_rows(state.keys_bhld, times), _rows(state.values_bhld, times))


def _rows(tensor: Tensor, times: int) -> Tensor:
    return tensor[:, None].expand(-1, times, *tensor.shape[1:]).flatten(0, 1)


def _vision_attention(attention: Any, hidden_bpd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    batch, patches, width = hidden_bpd.shape
    mixed = attention.qkv(hidden_bpd).view(batch, patches, 3, attention.num_heads, -1)
    query, key, value = mixed.unbind(dim=2)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=attention.scaling
    )
    projected: Tensor = attention.proj(attended.transpose(1, 2).reshape(batch, patches, width))
    return projected


def _attention(
    net: Any,
    hidden_bld: Tensor,
    rotary: tuple[Tensor, Tensor],
    before: AttentionState | None,
    *,
    last_only: bool,
) -> tuple[Tensor, AttentionState]:
    """Gated full attention; with `last_only` the output is that of the last position, [B, 1, D]."""
    batch, length, _ = hidden_bld.shape
    heads = (batch, length, -1, net.head_dim)
    query, gate = net.q_proj(hidden_bld).view(batch, length, -1, 2 * net.head_dim).chunk(2, dim=-1)
    query = net.q_norm(query).transpose(1, 2)
    key = net.k_norm(net.k_proj(hidden_bld).view(heads)).transpose(1, 2)
    value = net.v_proj(hidden_bld).view(heads).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    if before is not None:
        key = torch.cat([before.keys_bhld, key], dim=2)
        value = torch.cat([before.values_bhld, value], dim=2)
    state = AttentionState(key, value)
    if last_only:
        query, gate = query[:, :, -1:], gate[:, -1:]
    rows, columns = query.shape[2], key.shape[2]
    visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=net.scaling, enable_gqa=True
    )
    gated = attended.transpose(1, 2).reshape(batch, rows, -1) * torch.sigmoid(gate.reshape(batch, rows, -1))
    return net.o_proj(gated), state


def _delta_net(net: Any, hidden_bld: Tensor, before: DeltaState | None) -> tuple[Tensor, DeltaState]:
    batch, length, _ = hidden_bld.shape
    mixed = net.in_proj_qkv(hidden_bld)
    context = net.conv_kernel_size - 1
    past = before.conv_blc if before is not None else mixed.new_zeros(batch, context, mixed.shape[2])
    padded = torch.cat([past, mixed], dim=1)
    taps = net.conv1d.weight[:, 0]
    mixed = F.silu(sum(padded[:, k : k + length] * taps[:, k] for k in range(context + 1)))
    widths = [net.key_dim, net.key_dim, net.value_dim]
    query, key, value = (
        part.view(batch, length, -1, dim).transpose(1, 2)
        for part, dim in zip(
            mixed.split(widths, dim=-1), (net.head_k_dim, net.head_k_dim, net.head_v_dim), strict=True
        )
    )
    log_decay = -net.A_log.exp() * F.softplus(net.in_proj_a(hidden_bld) + net.dt_bias)
    beta = net.in_proj_b(hidden_bld).sigmoid()
    memory = before.memory_bhdd if before is not None else None
    out, memory = delta_rule(query, key, value, log_decay.transpose(1, 2), beta.transpose(1, 2), memory)
    gate = net.in_proj_z(hidden_bld).view(batch, length, -1, net.head_v_dim)
    normed = net.norm(out.transpose(1, 2), gate).reshape(batch, length, -1)
    return net.out_proj(normed), DeltaState(padded[:, -context:], memory)


def delta_rule(
    query_bhld: Tensor,
    key_bhld: Tensor,
    value_bhld: Tensor,
    log_decay_bhl: Tensor,
    beta_bhl: Tensor,
    memory_bhdd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over one segment as a single chunk, with as many query as value heads.

    The unit triangular system of the UT transform is inverted by doubling, (I + A)⁻¹ = Π (I + (−A)^(2^k)),
    which ends because A is nilpotent; a few small matrix products are much faster than torch's solver.

    Returns:
        Outputs [B, H, L, D] and the memory after the segment [B, H, D, D].
    """
    query = _unit(query_bhld) * query_bhld.shape[-1] ** -0.5
    key = _unit(key_bhld)
    total = log_decay_bhl.cumsum(dim=-1)
    length = total.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    weighted = key * beta_bhl[..., None]
    inverse = _unit_lower_inverse(((weighted @ key.transpose(-1, -2)) * decay).tril(-1))
    new = inverse @ (value_bhld * beta_bhl[..., None])
    grown = total.exp()[..., None]
    if memory_bhdd is not None:
        new = new - inverse @ (weighted * grown) @ memory_bhdd
    out = ((query @ key.transpose(-1, -2)) * decay) @ new
    memory = (key * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2) @ new
    if memory_bhdd is not None:
        out = out + (query * grown) @ memory_bhdd
        memory = memory + memory_bhdd * total[..., -1].exp()[..., None, None]
    return out, memory


def _unit(vectors: Tensor) -> Tensor:
    return vectors * torch.rsqrt((vectors * vectors).sum(dim=-1, keepdim=True) + 1e-6)


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    """(I + strict)⁻¹ for strictly lower triangular `strict` [..., L, L]."""
    power = -strict
    inverse = power + torch.eye(strict.shape[-1])
    covered = 2
    while covered < strict.shape[-1]:
        power = power @ power
        inverse = inverse + inverse @ power
        covered *= 2
    return inverse
