"""The runtime without the libraries of training and export: it must import fast and score."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BLOCKED = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "mobius",
    "scipy",
    "safetensors",
    "typer",
)
MAX_IMPORT_SECONDS = 0.5

PROGRAM = f"""
import sys
import time

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
start = time.process_time()
from zreward.runtime import Scorer
seconds = time.process_time() - start

import json
with Scorer.open(sys.argv[1]) as scorer:
    score = scorer.score(prompt="a red wall", images=[sys.argv[2]])[0]
print(json.dumps({{"seconds": seconds, **score.to_dict()}}))
"""


@pytest.fixture(scope="module")
def runs(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three runs of the program, each in a process of its own."""
    image = tmp_path_factory.mktemp("footprint") / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image)
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle), str(image)]
    outputs = [subprocess.run(command, capture_output=True, text=True) for _ in range(3)]
    assert all(output.returncode == 0 for output in outputs), outputs[0].stderr
    return [json.loads(output.stdout) for output in outputs]


def test_scores_with_the_heavy_libraries_blocked(runs: list[dict[str, Any]]) -> None:
    assert set(runs[0]["dimensions"]) == {"alignment", "realism", "aesthetics", "plausibility"}


def test_imports_in_half_a_second(runs: list[dict[str, Any]]) -> None:
    # Processor time, and the fastest of three: on a busy machine the clock measures the other processes.
    assert min(run["seconds"] for run in runs) <= MAX_IMPORT_SECONDS
