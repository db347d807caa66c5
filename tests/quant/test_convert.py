"""`zreward quantize`: what it writes, and what it leaves behind when it fails or is killed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import zreward.quant.convert as convert_module
from tests.support.kills import is_left, run_and_kill
from zreward.checkpoint import Checkpoint
from zreward.errors import QuantizationError, UsageError
from zreward.quant.convert import quantize_to_gptq
from zreward.quant.formats import open_checkpoint
from zreward.quant.rtn import quantize_rtn
from zreward.quant.source import QuantizedCheckpoint
from zreward.quant.tensor import WeightFormat


@pytest.fixture(scope="module")
def written(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in 4 bits. Shared: not to be changed."""
    output = tmp_path_factory.mktemp("gptq") / "folder" / "out"
    quantize_to_gptq(tiny_checkpoint, output, method="rtn", group_size=16)
    return output


def content(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint; one that holds a folder fails."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_checkpoint_is_written_and_nothing_else(written: Path, tiny_checkpoint: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["out"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "contract.json"} <= set(content(written))
    result, source = open_checkpoint(written), Checkpoint.open(tiny_checkpoint)
    assert isinstance(result, QuantizedCheckpoint)
    assert set(result.weights.formats.values()) == {WeightFormat(4, 16)}
    for name in result.weights.formats:
        expected = quantize_rtn(torch.from_numpy(source.read(name)), WeightFormat(4, 16))
        assert np.array_equal(result.read(name), expected.dequantized())


def test_a_name_that_cannot_be_written_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "quantize", lambda *_: pytest.fail("quantization began"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="exists; choose another name"):
        quantize_to_gptq(tiny_checkpoint, tmp_path / "thesis", method="rtn")
    with pytest.raises(UsageError, match="not a checkpoint"):
        quantize_to_gptq(tiny_checkpoint, tmp_path / "thesis", method="rtn", replace=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]


def test_a_failure_keeps_the_earlier_checkpoint_and_leaves_nothing(
    written: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(written, tmp_path / "out"))

    def fail(source: Checkpoint, weights: object, path: Path, progress: object) -> None:
        assert list(path.glob("*/index.json")), "the store lies in the staged directory"
        raise QuantizationError("no")

    monkeypatch.setattr(convert_module, "write_gptq_checkpoint", fail)
    with pytest.raises(QuantizationError, match="no"):
        quantize_to_gptq(tiny_checkpoint, output, method="rtn", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(output) == content(written)


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_checkpoint_or_none(
    reference_student: Path, tmp_path: Path
) -> None:
    output = tmp_path / "folder" / "out"
    command = ["quantize", reference_student, "-o", output, "--method", "rtn", "--force"]
    seconds = run_and_kill(command, output)
    expected = content(output)
    shutil.rmtree(output)
    generator = random.Random(5)
    leftovers = 0
    for moment in [0.0, *sorted(generator.uniform(0, 1.1) for _ in range(4))]:
        run_and_kill(command, output, moment * seconds)
        leftovers += is_left(output)
        if output.exists():
            assert content(output) == expected
    assert leftovers >= 2, "it was killed too late to prove anything"
    run_and_kill(command, output)
    assert content(output) == expected
    assert not is_left(output)
    open_checkpoint(output).contract()
