"""Rows through a model in pieces: outputs of all of them, and the exact gradient of a loss that couples them.

The pairwise terms compare every sample with every one of the other side, so the loss of a step is no sum over its
pieces. `backward` therefore runs each piece twice where there are several: once without gradient, to know all outputs
and the loss's gradient with respect to them; then again with gradient, piece by piece, sending that gradient on. Memory
is that of one piece and the result that of one large pass, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zreward.training.model import Outputs, RewardModel
from zreward.training.sequences import Batch, Row


@dataclass(frozen=True)
class RowOutputs:
    """Outputs of rows, one row each, padded on the right.

    Attributes:
        log_probs_nk: float32 [rows, bins]; uniform where there is no answer.
        valid_n: whether the row has an answer.
        off_scale_n: float32, 0 where there is no answer.
        token_log_probs_nt: float32, of the tokens of each row's output, 0 after its end.
        mask_nt: where there is a token.
    """

    log_probs_nk: Tensor
    valid_n: Tensor
    off_scale_n: Tensor
    token_log_probs_nt: Tensor
    mask_nt: Tensor


@torch.no_grad()
def run_rows(model: nn.Module, core: RewardModel, rows: Sequence[Row], micro_batch: int) -> RowOutputs:
    """Outputs without gradient.

    Args:
        model: what is called, `core` itself or what accelerate made of it.
        core: the model inside.
        micro_batch: rows at a time.
    """
    batches = list(_batches(core, rows, micro_batch))
    return _assembled(core, rows, batches, [model(batch) for batch in batches])


def backward(
    model: nn.Module,
    core: RewardModel,
    rows: Sequence[Row],
    micro_batch: int,
    loss_of: Callable[[RowOutputs], Tensor],
    send_back: Callable[[Tensor], None] = Tensor.backward,
    n_pieces: int | None = None,
) -> float:
    """Add the gradient of `loss_of(outputs of all rows)` to the parameters; returns the loss.

    Args:
        send_back: what starts a backward pass, `accelerator.backward` where there is one.
        n_pieces: how many pieces to run, where other processes have more rows and all must run as many.
    """
    batches = list(_batches(core, rows, micro_batch))
    idle = max(0, (n_pieces or 0) - len(batches))
    if len(batches) + idle == 1:
        loss = loss_of(_assembled(core, rows, batches, [model(batches[0])]))
        send_back(loss)
        return loss.item()
    with torch.no_grad():
        first = [model(batch) for batch in batches]
        for _ in range(idle):
            model(batches[0])
    leaves = [_leaves(outputs) for outputs in first]
    loss = loss_of(_assembled(core, rows, batches, leaves))
    loss.backward()
    for batch, known in zip(batches, leaves, strict=True):
        again: Outputs = model(batch)
        bins = _weighted(again.bin_log_probs_ak, known.bin_log_probs_ak.grad)
        send_back(bins + _weighted(again.token_log_probs_t, known.token_log_probs_t.grad))
    for _ in range(idle):
        again = model(batches[0])
        send_back(_weighted(again.bin_log_probs_ak, None) + _weighted(again.token_log_probs_t, None))
    return loss.item()


def _batches(core: RewardModel, rows: Sequence[Row], size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield core.collator.batch(rows[start : start + size]).to(core.net.device)


def _leaves(outputs: Outputs) -> Outputs:
    return Outputs(
        outputs.bin_log_probs_ak.detach().requires_grad_(),
        outputs.off_scale_a,
        outputs.token_log_probs_t.detach().requires_grad_(),
    )


def _weighted(values: Tensor, gradient: Tensor | None) -> Tensor:
    """A scalar whose gradient with respect to `values` is `gradient`; without one, 0 that still reaches them."""
    return (values * (torch.zeros_like(values) if gradient is None else gradient)).sum()


def _assembled(
    core: RewardModel, rows: Sequence[Row], batches: Sequence[Batch], outputs: Sequence[Outputs]
) -> RowOutputs:
    """One row each, from the flat outputs of the pieces."""
    n_codes, device = len(batches[0].codes), core.net.device
    longest = max(len(row.output or ()) for row in rows)
    log_probs_nk = torch.full((len(rows), n_codes), 1 / n_codes, device=device).log()
    valid_n = torch.zeros(len(rows), dtype=torch.bool, device=device)
    off_scale_n = torch.zeros(len(rows), device=device)
    tokens_nt = torch.zeros(len(rows), longest, device=device)
    mask_nt = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
    start = 0
    for batch, out in zip(batches, outputs, strict=True):
        answered = batch.answer_rows_a + start
        log_probs_nk = log_probs_nk.index_put((answered,), out.bin_log_probs_ak)
        valid_n[answered] = True
        off_scale_n[answered] = out.off_scale_a
        where = (batch.token_rows_t + start, _places(batch.token_rows_t))
        tokens_nt = tokens_nt.index_put(where, out.token_log_probs_t)
        mask_nt[where] = True
        start += len(batch.ids_bs)
    return RowOutputs(log_probs_nk, valid_n, off_scale_n, tokens_nt, mask_nt)


def _places(rows_t: Tensor) -> Tensor:
    """The number of each token inside its row, for tokens that are sorted by row."""
    inverse: Tensor
    counts: Tensor
    _, inverse, counts = torch.unique_consecutive(rows_t, return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(rows_t), device=rows_t.device) - starts[inverse]
