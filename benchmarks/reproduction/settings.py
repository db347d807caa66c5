"""How large a reproduction is: sizes of the models, steps of the methods, on a CPU or a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Size:
    """Widths of a language model; all sizes have the reference student's vision tower."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int


TEACHER = Size("teacher", layers=8, hidden=192, ffn=512, heads=4)
STUDENT = Size("student", layers=4, hidden=192, ffn=512, heads=4)


@dataclass(frozen=True)
class Settings:
    """One reproduction.

    Attributes:
        sizes: the first one's width decides the tower's output.
        scale: of the benchmark's splits.
        seeds: of the methods; base models and data are the same for all.
        tower_steps, tower_prompts: of the first stage of the base models.
        describe_steps, answer_steps: of their second and third stage.
        describe_batch: images in a batch of these.
        sft_steps: of SFT and RewardDance.
        policy_steps: of GRPO and GDSO.
        opd_steps, risd_steps: of the students that a teacher teaches.
        unlabelled_images, validation_images, test_images: how many of these splits are used, the first ones.
        micro_batch: sequences in one pass.
        workers: experiments at a time.
        threads: of each.
    """

    sizes: tuple[Size, ...] = (STUDENT, TEACHER)
    scale: float = 1.0
    base_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    tower_steps: int = 5_000
    tower_prompts: int = 6_000
    describe_steps: int = 6_000
    answer_steps: int = 100
    describe_batch: int = 64
    sft_steps: int = 400
    policy_steps: int = 400
    opd_steps: int = 400
    risd_steps: int = 1_600
    unlabelled_images: int = 6_000
    validation_images: int = 360
    test_images: int = 1_800
    micro_batch: int = 64
    precision: str = "bf16"
    workers: int = 1
    threads: int | None = None


def settings_for(device: torch.device) -> Settings:
    """The full setting on a GPU, a reduced one on a CPU."""
    if device.type == "cuda":
        return Settings()
    return Settings(
        describe_steps=2_000,
        describe_batch=16,
        sft_steps=200,
        policy_steps=200,
        opd_steps=200,
        risd_steps=1_000,
        validation_images=90,
        test_images=900,
        precision="fp32",
        workers=max(1, (os.cpu_count() or 1)),
        threads=1,
    )
