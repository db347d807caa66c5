"""Two processes with FSDP take the steps of one."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import commands
from tests.support.training import config_text, logged
from zreward.errors import UsageError
from zreward.training.config import load_config
from zreward.training.run import check_inputs


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def train(method: str, config: Path, processes: int) -> None:
    """Run `zreward train` as `torchrun` would, on the CPU with gloo."""
    common = {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
    }
    logs = [config.with_name(f"{config.stem}-{processes}-{rank}.log") for rank in range(processes)]
    running = []
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(
            commands.start("train", method, "--config", config, stderr=log, environment=common | own)
        )
    deadline = time.monotonic() + 300
    try:
        while any(process.exitcode is None for process in running):
            said = "\n".join(log.read_text() for log in logs if log.exists())
            assert not any(process.exitcode for process in running), said
            assert time.monotonic() < deadline, f"no end after 300 s\n{said}"
            time.sleep(0.1)
    finally:
        for process in running:  # one whose partner failed waits for it
            process.kill()
            process.join()
    assert not any(process.exitcode for process in running), "\n".join(log.read_text() for log in logs)


def test_only_the_first_process_judges_the_output_folder(
    reference_student: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may come when it has begun to write there."""
    config = tmp_path / "config.toml"
    config.write_text(config_text(reference_student, scenes, tmp_path / "run", steps=1), encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.partial").write_text("{")
    monkeypatch.setenv("RANK", "1")
    assert check_inputs(load_config(config), "sft").method == "sft"
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="is not empty"):
        check_inputs(load_config(config), "sft")


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(reference_student: Path, scenes: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        config = tmp_path / f"{processes}.toml"
        text = config_text(
            reference_student,
            scenes,
            tmp_path / f"run-{processes}",
            steps=4,
            batch_size=6,
            run="shard = true",
            validation=True,
        ).replace("save_every = 0", "save_every = 2")
        config.write_text(text, encoding="utf-8")
        train("sft", config, processes)
    one, two = (logged(tmp_path / f"run-{processes}", "step", "loss") for processes in (1, 2))
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-5)
    weights = [load_file(tmp_path / f"run-{n}" / "model" / "model.safetensors") for n in (1, 2)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name].float(), value.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_a_sharded_model_samples_and_learns(reasoner: Path, scenes: Path, tmp_path: Path) -> None:
    """Two processes, each with half of every weight, sample groups of different lengths."""
    config = tmp_path / "gdso.toml"
    method = "[method.sampling]\ngroup_size = 2\nmax_new_tokens = 12"
    text = config_text(
        reasoner, scenes, tmp_path / "run", steps=2, batch_size=2, run="shard = true", method=method
    )
    config.write_text(text, encoding="utf-8")
    train("gdso", config, 2)
    assert len(logged(tmp_path / "run", "step", "loss")) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_processes_share_the_questions_to_a_teacher(
    reference_student: Path, reasoner: Path, scenes: Path, tmp_path: Path
) -> None:
    """What two of them ask is what one asks: the answers' seeds belong to their parts."""
    sampling = "[method.sampling]\ngroup_size = 1\nmax_new_tokens = 12"
    for processes in (1, 2):
        config = tmp_path / f"{processes}.toml"
        method = f'teacher = "{reasoner}"\n{sampling}'
        text = config_text(
            reference_student, scenes, tmp_path / f"run-{processes}", steps=1, batch_size=2, method=method
        )
        config.write_text(text, encoding="utf-8")
        train("risd", config, processes)
    one, two = (sorted((tmp_path / f"run-{n}" / "teacher").glob("part-*.safetensors")) for n in (1, 2))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) > 1
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(load_file(theirs), load_file(ours), equal_nan=True)
