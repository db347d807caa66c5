"""What training tests share: configs and chains for small runs."""

from __future__ import annotations

import json
from pathlib import Path

SCENE_SIZE = 72
"""Side of the images: 9 language tokens of the reference student."""


def config_text(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    steps: int,
    batch_size: int = 4,
    model: str = "",
    run: str = "",
    method: str = "",
    validation: bool = False,
    micro_batch: int = 8,
) -> str:
    """A config with the rates of a small model."""
    held_out = f'validation = "{data}"' if validation else ""
    return f"""
[data]
train = "{data}"
{held_out}
[model]
checkpoint = "{checkpoint}"
{model}
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[run]
output = "{output}"
steps = {steps}
batch_size = {batch_size}
micro_batch = {micro_batch}
save_every = 0
log_every = 1
threads = 1
{run}
[method]
{method}
"""


def write_chains(path: Path, scenes: Path) -> Path:
    """One chain of two words for every label: whether it is good, and of what."""
    lines = []
    for text in scenes.read_text(encoding="utf-8").splitlines():
        item = json.loads(text)
        for name, score in item["scores"].items():
            word = "good" if score > 3 else "bad"
            lines.append(json.dumps({"id": item["id"], "dimension": name, "chain": f"{word} {name}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def logged(run: Path, kind: str, name: str) -> list[float]:
    """The values of one figure in the events of one kind of a run's log."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return [event[name] for event in events if event["event"] == kind]
