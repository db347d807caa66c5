"""How large a reproduction is: sizes of the models, steps of the methods, on a CPU or a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from zreward.synthetic import SceneConfig


@dataclass(frozen=True)
class Size:
    """A language model; all sizes have the reference student's vision tower and its widths.

    Attributes:
        layers: of it.
        grown_from: name of the size whose base model this one's continues, with layers added.
    """

    name: str
    layers: int
    grown_from: str | None = None


STUDENT = Size("student", layers=4)
TEACHER = Size("teacher", layers=8, grown_from=STUDENT.name)


@dataclass(frozen=True)
class Settings:
    """One reproduction.

    Attributes:
        sizes: each after the one that it is grown from.
        scale: of the benchmark's splits.
        scenes: their difficulty.
        seeds: of the methods; base models and data are the same for all.
        read_steps: of the first lesson of a base model, 32 images each.
        describe_steps: by size, and `answer_steps`: of the lessons after it.
        describe_batch: images in a batch of these.
        sft_steps: of SFT and RewardDance.
        policy_steps: of GRPO and GDSO.
        opd_steps, risd_steps: of the students that a teacher teaches.
        averaged_traces: outputs of a GDSO model that are averaged for a second look at it; 1 for none.
        unlabelled_images, validation_images, test_images: how many of these splits are used, the first ones.
        micro_batch: sequences in one pass.
        workers: experiments at a time.
        threads: of each.
    """

    sizes: tuple[Size, ...] = (STUDENT, TEACHER)
    scale: float = 1.0
    scenes: SceneConfig = field(default_factory=SceneConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    read_steps: int = 4_000
    describe_steps: dict[str, int] = field(default_factory=lambda: {"student": 6_000, "teacher": 3_000})
    answer_steps: int = 100
    describe_batch: int = 64
    sft_steps: int = 400
    policy_steps: int = 400
    opd_steps: int = 400
    risd_steps: int = 1_600
    averaged_traces: int = 4
    unlabelled_images: int = 6_000
    validation_images: int = 360
    test_images: int = 1_800
    micro_batch: int = 256
    precision: str = "bf16"
    workers: int = 1
    threads: int | None = None


def settings_for(device: torch.device) -> Settings:
    """The full setting on a GPU, a reduced one on a CPU: at most two objects in a prompt, and fewer steps."""
    if device.type == "cuda":
        return Settings()
    return Settings(
        scenes=SceneConfig(max_objects=2),
        read_steps=1_600,
        describe_steps={"student": 500, "teacher": 300},
        describe_batch=16,
        sft_steps=60,
        policy_steps=60,
        opd_steps=160,
        risd_steps=700,
        averaged_traces=1,
        unlabelled_images=1_500,
        validation_images=60,
        test_images=600,
        precision="fp32",
        workers=max(1, (os.cpu_count() or 1)),
        threads=1,
    )
