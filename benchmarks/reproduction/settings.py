"""How large a reproduction is: sizes of the models, steps of the methods, on a CPU or a GPU."""

from __future__ import annotations

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
        tower_steps, tower_prompts: of the first stage of the base models.
        describe_steps, describe_batch: of their second stage; a batch is counted in images.
        sft_steps, policy_steps, distil_steps: of SFT and RewardDance, of GRPO and GDSO, of RISD (OPD a quarter).
        micro_batch: sequences in one pass.
        seeds: of the methods; base models and data are the same for all.
    """

    sizes: tuple[Size, ...] = (STUDENT, TEACHER)
    scale: float = 1.0
    base_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    tower_steps: int = 5_000
    tower_prompts: int = 6_000
    describe_steps: int = 6_000
    describe_batch: int = 8
    sft_steps: int = 400
    policy_steps: int = 300
    distil_steps: int = 1_600
    micro_batch: int = 64
    precision: str = "fp32"
    threads: int | None = 2


def settings_for(device: torch.device) -> Settings:
    """The full setting on a GPU, a reduced one on a CPU."""
    if device.type == "cuda":
        return Settings(precision="bf16", threads=None, describe_batch=32)
    return Settings()
