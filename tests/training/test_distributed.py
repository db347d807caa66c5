"""Two processes with FSDP take the steps of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.training import config_text, logged

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def train(method: str, config: Path, processes: int) -> None:
    """Run `zreward train` as `torchrun` would, on the CPU with gloo."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
    }
    command = [sys.executable, "-m", "zreward.cli", "train", method, "--config", str(config)]
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=common | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


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
