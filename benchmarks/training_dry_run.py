"""A few steps of a method on a real shape: seconds a step and peak memory.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B
    python benchmarks/training_dry_run.py build/random-0.8B --method gdso --steps 2 --lora-rank 16 --image-size 96
    python benchmarks/random_checkpoint.py --shape 0.8B --seed 1 --output build/random-teacher
    python benchmarks/training_dry_run.py build/random-0.8B --method risd --teacher build/random-teacher --steps 2
    python benchmarks/training_dry_run.py build/random-9B --method gdso --steps 5 --lora-rank 16 --quantize nf4

The data are drawn scenes. A model with random weights never ends a trace by itself, so outputs are ended here, with a
score by chance: then every loss has something to work on. The time of a step is that of a real one, its loss means
nothing.

Memory on the CPU is the peak of resident pages of the process, on a GPU what torch allocated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from zreward.synthetic import SceneConfig, write_dataset
from zreward.training import gdso, grpo, opd, risd, sft
from zreward.training import run as training_run
from zreward.training.config import load_config
from zreward.training.model import RewardModel
from zreward.training.rollout import sample_outputs
from zreward.training.sequences import Row


class Ended:
    """Sampling, and then the end of the trace and a score where an output has none."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, model: RewardModel, questions: Sequence[Row], *arguments: Any) -> list[list[Row]]:
        encoder = model.collator.encoder
        end = tuple(encoder.trace_ids("").tolist())
        groups = sample_outputs(model, questions, *arguments)
        return [
            [
                replace(row, output=(*(row.output or ()), *end, int(self._rng.choice(encoder.code_ids))))
                for row in group
            ]
            for group in groups
        ]


METHODS: dict[str, Any] = {"sft": sft, "grpo": grpo, "gdso": gdso, "risd": risd, "opd": opd}


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = write_dataset(folder / "scenes", SceneConfig(size=options.image_size), 0, 4, candidates=2)
        config = folder / "config.toml"
        config.write_text(config_text(options, scenes, folder / "run"), encoding="utf-8")
        training_run.sample_outputs = Ended()  # type: ignore[assignment]  # in place of the function, here alone
        started = time.perf_counter()
        METHODS[options.method].train(load_config(config), lambda *_: None)
        seconds = time.perf_counter() - started
        events = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    report(options, events, seconds)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--method", choices=METHODS, default="gdso")
    parser.add_argument("--teacher", type=Path, help="another checkpoint, for risd and opd")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--quantize", choices=["nf4", "int8"])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def config_text(options: argparse.Namespace, scenes: Path, output: Path) -> str:
    quantize = f'quantize = "{options.quantize}"' if options.quantize else ""
    taught = options.method in ("risd", "opd")
    teacher = f'teacher = "{(options.teacher or options.checkpoint).resolve()}"' if taught else ""
    # A random teacher's traces never end: it answers at once.
    direct = "reasoning = false" if options.method == "risd" else ""
    sampling = (
        f"[method.sampling]\ngroup_size = {options.group_size}\nmax_new_tokens = {options.max_new_tokens}"
        if options.method != "sft"
        else ""
    )
    return f"""
[data]
train = "{scenes}"
[model]
checkpoint = "{options.checkpoint.resolve()}"
lora_rank = {options.lora_rank}
precision = "{options.precision}"
gradient_checkpointing = {str(options.gradient_checkpointing).lower()}
{quantize}
[run]
output = "{output}"
steps = {options.steps}
batch_size = {options.batch_size}
micro_batch = {options.micro_batch}
save_every = 0
log_every = 1
[method]
{teacher}
{direct}
{sampling}
"""


def report(options: argparse.Namespace, events: list[dict[str, Any]], seconds: float) -> None:
    steps = [event for event in events if event["event"] == "step"]
    times = [
        steps[0]["seconds"],
        *(b["seconds"] - a["seconds"] for a, b in itertools.pairwise(steps)),
    ]
    on_gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    result = {
        "checkpoint": options.checkpoint.name,
        "method": options.method,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "parameters": events[0]["parameters"],
        "losses": [step["loss"] for step in steps],
        "seconds_of_steps": times,
        "median_seconds": statistics.median(times),
        "seconds_with_loading_and_saving": seconds,
        "peak_bytes": peak,
    }
    print(
        f"{options.method}: {result['parameters']['trained']:,} of {result['parameters']['all']:,} parameters learn"
    )
    print(f"losses {', '.join(f'{loss:.4f}' for loss in result['losses'])}")
    print(f"seconds of the steps: {', '.join(f'{value:.1f}' for value in times)}; everything {seconds:.0f} s")
    print(f"peak memory {peak / 1e9:.2f} GB ({result['device']})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
