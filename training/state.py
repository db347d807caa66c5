"""Resumable states of a run on disk: what learned, the optimizer's memory, and the step.

A state is a directory `states/step-00000100` with `weights.safetensors`, `optimizer.safetensors`, `state.json` and, for
methods that carry more, `extra.safetensors`. It is written beside its name and renamed, so one that exists is complete,
whenever the process died. Nothing else has to be kept: the order of the data and all sampling are functions of the seed
and the step, and so is the learning rate.

Tensors go through torch's distributed state dictionaries, which are the same for one process and for FSDP.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from zreward.errors import CheckpointError
from zreward.jsonfile import read_json_object, write_json
from zreward.training.model import trainable

STATES = "states"
WEIGHTS_FILE, OPTIMIZER_FILE, EXTRA_FILE = "weights.safetensors", "optimizer.safetensors", "extra.safetensors"
STATE_FILE = "state.json"


def save_state(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Tensor],
    keep: int,
) -> None:
    """Write the state after `step` steps into `directory`, and remove all but the latest `keep`.

    `extra` holds what a method carries from step to step, the same in every process.

    All processes of a distributed run must call it; the first one writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    learned = {name for name, _ in trainable(model)}
    weights: dict[str, Any] = {
        name: value for name, value in get_model_state_dict(model, options=options).items() if name in learned
    }
    memory = get_optimizer_state_dict(model, optimizer, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        _write(directory / STATES, step, weights, memory, extra)
        for old in _states(directory)[:-keep]:
            shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()


def latest_state(directory: Path) -> Path | None:
    """The most advanced complete state of a run, None where there is none."""
    found = _states(directory)
    return found[-1] if found else None


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Tensor]]:
    """Continue from a state; returns how many steps it has behind it, and what the method carries.

    Raises:
        CheckpointError: a file of it is damaged, or it is of another model.
    """
    info = read_json_object(path / STATE_FILE, CheckpointError)
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
    )
    try:
        weights = load_file(path / WEIGHTS_FILE)
        memory = _nested(load_file(path / OPTIMIZER_FILE))
    except Exception as error:  # safetensors raises its own type and OSError
        raise CheckpointError(
            f"{path}: damaged ({error}); remove this folder, and the run goes on from the state before it"
        ) from None
    expected = {name for name, _ in trainable(model)}
    if weights.keys() != expected:
        odd = sorted(weights.keys() ^ expected)[0]
        raise CheckpointError(
            f"{path}: a state of another model, as {odd!r} shows; choose another run.output"
        )
    set_model_state_dict(model, dict(weights), options=options)
    groups = _filled_groups(info["param_groups"])
    stored: Any = {"state": memory, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, stored, options=options)
    extra = load_file(path / EXTRA_FILE) if (path / EXTRA_FILE).is_file() else {}
    return int(info["step"]), extra


def _states(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / STATES).glob("step-*") if (path / STATE_FILE).is_file())


def _write(
    states: Path, step: int, weights: dict[str, Tensor], memory: dict[str, Any], extra: Mapping[str, Tensor]
) -> None:
    final = states / f"step-{step:08d}"
    partial = states / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, partial / WEIGHTS_FILE)
    save_file(_flat(memory["state"]), partial / OPTIMIZER_FILE)
    if extra:
        save_file({name: value.contiguous() for name, value in extra.items()}, partial / EXTRA_FILE)
    write_json(partial / STATE_FILE, {"step": step, "param_groups": _plain(memory["param_groups"])})
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(states)


def _flat(state: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Optimizer memory by "parameter/name"; plain numbers become tensors of one element."""
    return {
        f"{parameter}/{name}": value.contiguous() if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, values in state.items()
        for name, value in values.items()
    }


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    nested: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, _, name = key.rpartition("/")
        nested.setdefault(parameter, {})[name] = value
    return nested


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in JSON's types."""
    return [{key: _as_json(value) for key, value in group.items()} for group in groups]


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _filled_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they were before JSON, which has no tuples."""
    return [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()} for group in groups
    ]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
