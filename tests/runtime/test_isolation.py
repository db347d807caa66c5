"""The runtime in a process where the exporter's and trainer's packages cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from zreward.runtime import Scorer

BLOCKED = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "mobius",
    "scipy",
    "ml_dtypes",
    "safetensors",
    "typer",
    "rich",
)

SCRIPT = """
import json, sys, time

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
start = time.process_time()
import zreward.runtime
seconds = time.process_time() - start
early = [name for name in ("onnxruntime",) if name in sys.modules]
result = {"seconds": seconds, "early": early}
if len(sys.argv) > 2:
    from zreward.runtime.verify import verify_bundle
    with zreward.runtime.Scorer.open(sys.argv[2]) as scorer:
        score = scorer.score(prompt="a red fox", images=[sys.argv[3]])[0]
    result |= {"score": score.to_dict(), "golden": verify_bundle(sys.argv[2]).n_golden}
print(json.dumps(result))
"""


def run_isolated(*arguments: str | Path) -> dict[str, object]:
    command = [sys.executable, "-c", SCRIPT, ",".join(BLOCKED), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_scoring_and_verifying_need_none_of_the_exporters_packages(tiny_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    result = run_isolated(tiny_bundle, tmp_path / "noise.png")
    with Scorer.open(tiny_bundle) as scorer:
        expected = scorer.score(prompt="a red fox", images=[pixels])[0]
    found = result["score"]
    assert isinstance(found, dict)
    for name in expected:
        np.testing.assert_allclose(found["dimensions"][name]["probs"], expected[name].probs, atol=1e-5)
    assert result["golden"] == 4


def test_the_blocker_blocks() -> None:
    command = [sys.executable, "-c", SCRIPT + "\nimport torch", ",".join(BLOCKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "torch is blocked" in done.stderr


def test_importing_the_runtime_is_quick() -> None:
    """The import alone, in processor time: on a busy machine the clock would measure the other processes.

    The backend is loaded when a bundle is opened.
    """
    results = [run_isolated() for _ in range(3)]
    seconds = [result["seconds"] for result in results]
    assert all(isinstance(s, float) for s in seconds)
    assert min(seconds) <= 0.5  # type: ignore[type-var]
    assert all(result["early"] == [] for result in results)
