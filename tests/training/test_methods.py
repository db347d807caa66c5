"""A short run of every method: it learns what it is meant to, and its checkpoint exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.training import config_text, logged, write_chains
from zreward.errors import CheckpointError, UsageError
from zreward.export.build import ExportOptions, export_bundle
from zreward.runtime import Scorer
from zreward.training import gdso, grpo, opd, rewarddance, risd, sft
from zreward.training.config import load_config

Train = Callable[..., Path]

METHODS: dict[str, Any] = {
    "sft": sft,
    "rewarddance": rewarddance,
    "grpo": grpo,
    "gdso": gdso,
    "risd": risd,
    "opd": opd,
}
SAMPLING = "[method.sampling]\ngroup_size = {}\nmax_new_tokens = 16\n"


@pytest.fixture
def train(tmp_path: Path, scenes: Path) -> Train:
    """Run a method; returns the run's directory."""

    def run(name: str, checkpoint: Path, method: str = "", data: Path | None = None, **options: Any) -> Path:
        config = tmp_path / f"{name}.toml"
        options = {"steps": 8, "micro_batch": 32} | options
        text = config_text(checkpoint, data or scenes, tmp_path / name, method=method, **options)
        config.write_text(text, encoding="utf-8")
        METHODS[name].train(load_config(config))
        return tmp_path / name

    return run


def scores(model: Path, scenes: Path, tmp_path: Path) -> list[float]:
    """Means of the exported checkpoint for the first image."""
    bundle = export_bundle(model, tmp_path / "bundle", ExportOptions(parity=False)).path
    item = json.loads(scenes.read_text(encoding="utf-8").splitlines()[0])
    with Scorer.open(bundle, threads=1) as scorer:
        result = scorer.score(prompt=item["prompt"], images=[scenes.parent / item["image"]])[0]
    return [result[name].mean for name in result]


def mirrored(scenes: Path) -> Path:
    """The same images with scores at the other side of the scale: labels that no checkpoint here knows."""
    items = [json.loads(line) for line in scenes.read_text(encoding="utf-8").splitlines()]
    for item in items:
        item["scores"] = {name: 6 - score for name, score in item["scores"].items()}
    path = scenes.with_name("mirrored.jsonl")
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def halves(values: list[float]) -> tuple[float, float]:
    middle = len(values) // 2
    return float(np.mean(values[:middle])), float(np.mean(values[middle:]))


@pytest.mark.slow
class TestEachMethod:
    """All questions of one prompt in every batch, so that a falling loss is no luck of the draw."""

    def test_sft(
        self, train: Train, reference_student: Path, one_prompt: Path, scenes: Path, tmp_path: Path
    ) -> None:
        options = {"steps": 10, "batch_size": 3, "validation": True}
        run = train("sft", reference_student, "soft_targets = false", one_prompt, **options)
        losses = logged(run, "step", "loss")
        assert losses[-1] < 0.7 * losses[0]
        assert len(logged(run, "validation", "overall")) == 1
        assert all(1 <= value <= 5 for value in scores(run / "model", scenes, tmp_path))
        result = json.loads((run / "model" / "training.json").read_text(encoding="utf-8"))
        assert result["method"] == "sft"
        assert result["config"]["run"]["steps"] == 10
        assert result["versions"]["torch"] == torch.__version__

    def test_rewarddance(
        self, train: Train, reference_student: Path, one_prompt: Path, scenes: Path, tmp_path: Path
    ) -> None:
        chains = write_chains(tmp_path / "chains.jsonl", one_prompt)
        method = f'chains = "{chains}"\nmax_new_tokens = 16'
        run = train("rewarddance", reference_student, method, one_prompt, steps=10, batch_size=3)
        losses = logged(run, "step", "loss")
        assert losses[-1] < 0.7 * losses[0]
        scores(run / "model", scenes, tmp_path)

    def test_rewarddance_by_yes(self, train: Train, reference_student: Path, one_prompt: Path) -> None:
        """Two images in one sequence; pairs, and their images the other way round, are told apart."""
        method = 'form = "yes"\nanswers = ["9", "1"]'
        options = {"steps": 24, "batch_size": 8, "validation": True}
        run = train("rewarddance", reference_student, method, one_prompt, **options)
        losses = logged(run, "step", "loss")
        assert losses[-1] < 0.7 * losses[0]
        assert logged(run, "validation", "overall")[0]["hpa"] > 0.7

    def test_grpo(self, train: Train, reasoner: Path, one_prompt: Path, scenes: Path, tmp_path: Path) -> None:
        """What it lowers is the lack of reward: samples come to deserve more of it."""
        run = train("grpo", reasoner, SAMPLING.format(4), one_prompt, steps=10, batch_size=3)
        first, second = halves(logged(run, "step", "reward"))
        assert second > first
        scores(run / "model", scenes, tmp_path)

    def test_gdso(self, train: Train, reasoner: Path, one_prompt: Path, scenes: Path, tmp_path: Path) -> None:
        data = mirrored(one_prompt)
        run = train("gdso", reasoner, SAMPLING.format(4), data, steps=16, batch_size=4)
        failed = logged(run, "step", "failed")
        assert failed[-1] < failed[0]
        # Failed samples lower both losses, so these are compared from where most samples answer.
        answering = next(step for step, share in enumerate(failed) if share < 0.2)
        for name in ("pointwise", "pairwise"):
            first, second = halves(logged(run, "step", name)[answering:])
            assert second < first
        scores(run / "model", scenes, tmp_path)

    def test_risd(
        self,
        train: Train,
        reference_student: Path,
        reasoner: Path,
        one_prompt: Path,
        tmp_path: Path,
        scenes: Path,
    ) -> None:
        method = f'teacher = "{reasoner}"\n' + SAMPLING.format(2)
        run = train("risd", reference_student, method, one_prompt, steps=10, batch_size=3)
        losses = logged(run, "step", "loss")
        assert losses[-1] < 0.5 * losses[0]
        scores(run / "model", scenes, tmp_path)

    def test_opd(
        self,
        train: Train,
        reference_student: Path,
        reasoner: Path,
        one_prompt: Path,
        tmp_path: Path,
        scenes: Path,
    ) -> None:
        """A student that never saw a trace comes closer to its teacher's, by the estimate of its own KL."""
        method = f'teacher = "{reasoner}"\n' + SAMPLING.format(2)
        run = train("opd", reference_student, method, one_prompt, steps=20, batch_size=12)
        found = logged(run, "step", "reverse_kl")
        assert np.mean(found[-6:]) < 0.9 * np.mean(found[:6])
        scores(run / "model", scenes, tmp_path)


def test_lora_and_checkpointing(train: Train, reference_student: Path, one_prompt: Path) -> None:
    model = "lora_rank = 8\ngradient_checkpointing = true\n"
    run = train("sft", reference_student, data=one_prompt, model=model, steps=10, batch_size=3)
    losses = logged(run, "step", "loss")
    assert losses[-1] < 0.9 * losses[0]


def test_several_updates_under_a_reference(train: Train, reasoner: Path) -> None:
    method = "beta = 0.1\nreference_every = 2\nupdates = 2\n" + SAMPLING.format(3)
    run = train("gdso", reasoner, method, steps=3, batch_size=1)
    assert len(logged(run, "step", "policy")) == 3


def test_parsed_rewards_are_those_of_the_answers_bin(train: Train, reasoner: Path) -> None:
    run = train("grpo", reasoner, 'reward_from = "parsed"\n' + SAMPLING.format(4), steps=2, batch_size=2)
    assert len(logged(run, "step", "reward")) == 2


class TestTeacher:
    def test_its_answers_are_kept_and_belong_to_one_run(
        self,
        train: Train,
        reference_student: Path,
        reasoner: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        method = f'teacher = "{reasoner}"\ncache = "{tmp_path / "answers"}"\n' + SAMPLING.format(1)
        train("risd", reference_student, method, steps=2)
        kept = {path.name: path.read_bytes() for path in (tmp_path / "answers").iterdir()}
        assert "part-000001.safetensors" in kept  # 96 questions

        (tmp_path / "risd").rename(tmp_path / "before")
        (tmp_path / "answers" / "part-000001.safetensors").unlink()  # as if killed there
        train("risd", reference_student, method, steps=2)
        again = {path.name: path.read_bytes() for path in (tmp_path / "answers").iterdir()}
        assert again == kept

        (tmp_path / "risd").rename(tmp_path / "second")
        with pytest.raises(UsageError, match=r"answers of another run \(sampling differs\)"):
            train("risd", reference_student, method.replace("max_new_tokens = 16", "max_new_tokens = 17"))

    def test_without_reasoning(self, train: Train, reference_student: Path) -> None:
        """A student that starts as its teacher has nothing to learn from it."""
        run = train("risd", reference_student, f'teacher = "{reference_student}"\nreasoning = false', steps=1)
        assert logged(run, "step", "loss")[0] == pytest.approx(0.0, abs=1e-5)

    def test_of_another_contract(self, train: Train, reference_student: Path, tiny_checkpoint: Path) -> None:
        with pytest.raises(UsageError, match="another tokenizer"):
            train("opd", reference_student, f'teacher = "{tiny_checkpoint}"')

    def test_one_that_never_answers(
        self, train: Train, reference_student: Path, tiny_checkpoint: Path
    ) -> None:
        method = f'teacher = "{tiny_checkpoint}"\n[method.sampling]\ngroup_size = 1\nmax_new_tokens = 4\n'
        with pytest.raises(
            (UsageError, CheckpointError), match=r"none of its traces led to a score|dimensions"
        ):
            train("risd", tiny_checkpoint, method)


class TestRefusedBeforeTraining:
    def test_a_batch_larger_than_the_data(self, train: Train, reference_student: Path) -> None:
        with pytest.raises(UsageError, match=r"batch_size is 500, but .* gives 24 items"):
            train("sft", reference_student, batch_size=500)

    def test_no_pairs(self, train: Train, reference_student: Path, scenes: Path, tmp_path: Path) -> None:
        single = tmp_path / "single.jsonl"
        lines = scenes.read_text(encoding="utf-8").splitlines()
        item = json.loads(lines[0])
        item["image"] = str(scenes.parent / item["image"])
        single.write_text(json.dumps(item) + "\n", encoding="utf-8")
        config = tmp_path / "gdso.toml"
        config.write_text(
            config_text(reference_student, single, tmp_path / "gdso", steps=1), encoding="utf-8"
        )
        with pytest.raises(UsageError, match="no two lines have the same prompt"):
            gdso.train(load_config(config))

    def test_a_checkpoint_that_is_none(self, train: Train, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no such checkpoint directory"):
            train("sft", tmp_path / "nothing")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_eight_bit_state_without_a_gpu(
        self, reference_student: Path, scenes: Path, tmp_path: Path
    ) -> None:
        config = tmp_path / "sft.toml"
        text = config_text(reference_student, scenes, tmp_path / "run", steps=1)
        config.write_text(text.replace("[optimizer]", '[optimizer]\nname = "adamw8bit"'), encoding="utf-8")
        with pytest.raises(UsageError, match="needs a GPU"):
            sft.train(load_config(config))
