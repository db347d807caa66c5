"""A few steps of a method on a real shape: seconds a step and peak memory.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B
    python benchmarks/training_dry_run.py build/random-0.8B --method gdso --steps 2 --lora-rank 16 --image-size 96
    python benchmarks/training_dry_run.py build/random-9B --method gdso --steps 5 --lora-rank 16 --quantize nf4

The data are drawn scenes. Weights are random, so traces hardly ever end and nearly every sample is a failed one: the
time of a step is that of a real one, its loss means nothing.

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from zreward.synthetic import SceneConfig, write_dataset
from zreward.training import gdso, grpo, opd, risd, sft
from zreward.training.config import load_config

METHODS: dict[str, Any] = {"sft": sft, "grpo": grpo, "gdso": gdso, "risd": risd, "opd": opd}


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = write_dataset(folder / "scenes", SceneConfig(size=options.image_size), 0, 4, candidates=2)
        config = folder / "config.toml"
        config.write_text(config_text(options, scenes, folder / "run"), encoding="utf-8")
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
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--quantize", choices=["nf4", "int8"])
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def config_text(options: argparse.Namespace, scenes: Path, output: Path) -> str:
    quantize = f'quantize = "{options.quantize}"' if options.quantize else ""
    teacher = f'teacher = "{options.checkpoint.resolve()}"' if options.method in ("risd", "opd") else ""
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
gradient_checkpointing = true
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
