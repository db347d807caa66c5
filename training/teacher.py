"""A frozen teacher's score distributions for every question of a data set, computed once and kept.

A teacher of 27B that writes 750 tokens for each question costs more than all training of the student, so its answers
are stored in parts as they come: a killed run goes on where it stopped, and another run with the same teacher,
contract, data and sampling finds them done. `teacher.json` in the folder has the hashes of all four; a folder of others
is refused.

A server may sample the traces, which is nearly all of the work. The distributions are read here even then, by one pass
over the ids that it returned: exactly, from the weights whose hash is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from zreward.checkpoint import CONFIG_FILE, Checkpoint
from zreward.errors import CheckpointError, UsageError
from zreward.jsonfile import read_json_object, write_json
from zreward.progress import Progress
from zreward.training.config import ModelConfig
from zreward.training.data import Question, TrainingSet
from zreward.training.model import RewardModel, check_same_contract, freeze, load_model
from zreward.training.passes import run_rows
from zreward.training.rollout import Rollout, Sampling, sample_outputs
from zreward.training.rollout_server import Server, check_served, server_rollout
from zreward.training.sequences import Row

META_FILE = "teacher.json"
_PART = 64
"""Questions of one part, after which a killed run loses nothing."""


def load_teacher(checkpoint: str, config: ModelConfig, device: torch.device) -> RewardModel:
    """A teacher for asking, under its own contract and in the precision of the run.

    Raises:
        CheckpointError: it is damaged, or of another architecture.
    """
    precision = config.precision
    return freeze(load_model(ModelConfig(checkpoint, contract=None, precision=precision), device))


def cached_distributions(
    folder: Path,
    teacher: str,
    config: ModelConfig,
    data: TrainingSet,
    questions: Sequence[Question],
    sampling: Sampling | None,
    *,
    seed: int,
    micro_batch: int,
    progress: Progress,
    server: Server | None = None,
) -> Tensor:
    """log q_T of every question, float32 [questions, bins]; NaN where no trace of the teacher led to a score.

    The distributions of `sampling.group_size` traces are averaged: the gradient of KL(mean ‖ student) is that of the
    mean KL over the traces. Without `sampling` the teacher answers without reasoning. With `server` the traces are
    sampled there. Several processes share the parts among them, each on its own device.

    Raises:
        UsageError: the folder holds answers of another teacher, contract, data set or sampling.
        CheckpointError: a part is damaged, or the teacher's contract asks other questions.
        BackendError: the server cannot be used (`zreward.training.rollout_server`).
    """
    meta = {
        "teacher_sha256": checkpoint_sha256(Checkpoint.open(teacher)),
        "contract_sha256": data.contract.sha256,
        "data_sha256": data.sha256,
        "questions": len(questions),
        "sampling": asdict(sampling) if sampling else None,
        "served_model": server.model if server else None,
        "seed": seed,
    }
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process:
        _check_folder(folder, meta)
    state.wait_for_everyone()
    parts = [questions[start : start + _PART] for start in range(0, len(questions), _PART)]
    model: RewardModel | None = None
    rollout: Rollout | None = None
    own = range(state.process_index, len(parts), state.num_processes)
    for number in own:
        part, path = parts[number], folder / f"part-{number:06d}.safetensors"
        if not path.is_file():
            if model is None:
                if server is not None:
                    check_served(server)
                model = load_teacher(teacher, config, state.device)
                check_same_contract(data.contract, model.contract, teacher)
                if server is not None:
                    rollout = server_rollout(server, Checkpoint.open(teacher), model.collator)
            rows = [Row(data.items[q.item].prompt, data.items[q.item].image, q.dimension) for q in part]
            values = distributions(model, rows, sampling, seed + number, micro_batch, rollout)
            partial = path.with_suffix(".partial")
            save_file({"log_probs": values.contiguous().cpu()}, partial)
            partial.replace(path)
        progress("asking the teacher", min((number + 1) * _PART, len(questions)), len(questions))
    state.wait_for_everyone()
    return torch.cat([_read_part(folder / f"part-{n:06d}.safetensors") for n in range(len(parts))])


def distributions(
    model: RewardModel,
    rows: Sequence[Row],
    sampling: Sampling | None,
    seed: int,
    micro_batch: int,
    rollout: Rollout | None = None,
) -> Tensor:
    """log of the mean distribution over a question's traces, float32 [rows, bins]; NaN where all traces failed.

    Args:
        rollout: samples the traces in place of the model.
    """
    if sampling is None:
        return run_rows(model, model, rows, micro_batch).log_probs_nk
    if rollout is not None:
        groups = rollout(rows, sampling, seed)
    else:
        groups = sample_outputs(model, rows, sampling, seed, micro_batch)
    out = run_rows(model, model, [row for group in groups for row in group], micro_batch)
    weights_ng = out.valid_n.view(len(rows), -1).float()
    probs_ngk = out.log_probs_nk.exp().view(len(rows), sampling.group_size, -1)
    mean_nk = (probs_ngk * weights_ng[..., None]).sum(1) / weights_ng.sum(1, keepdim=True)
    return mean_nk.log()  # 0 / 0 where nothing was valid


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Of all weights and the config: what a teacher's answers depend on."""
    digest = hashlib.sha256()
    files = {info.file for info in checkpoint.tensors.values()} | {checkpoint.path / CONFIG_FILE}
    for file in sorted(files):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_folder(folder: Path, meta: dict[str, object]) -> None:
    if (folder / META_FILE).is_file():
        before = read_json_object(folder / META_FILE, CheckpointError)
        changed = next((key for key in meta if before.get(key) != meta[key]), None)
        if changed is not None:
            raise UsageError(
                f"{folder} holds the answers of another run ({changed} differs); choose another method.cache, or "
                "remove the folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} is not empty and holds no answers of a teacher; choose another method.cache"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / META_FILE, meta)


def _read_part(path: Path) -> Tensor:
    try:
        return load_file(path)["log_probs"]
    except Exception as error:  # safetensors raises its own type
        raise CheckpointError(f"{path}: damaged ({error}); remove it, and it is asked again") from None
