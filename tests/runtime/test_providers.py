"""Which bundles a provider runs, and which options of a GPU it takes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zreward.errors import BackendError, UsageError
from zreward.runtime import GpuOptions
from zreward.runtime.backends import open_session
from zreward.runtime.backends.providers import PROVIDERS, check_options, check_target


def bundle_for(target: str, weights: str) -> Any:
    """What `check_target` looks at."""
    return SimpleNamespace(path=Path("bundle"), manifest=SimpleNamespace(target=target, weights=weights))


@pytest.mark.parametrize(
    ("target", "weights", "provider", "expected"),
    [
        ("cpu", "fp32", "cuda", "--provider cpu, or make one with .* --target cuda"),
        (
            "tensorrt",
            "fp16",
            "cuda",
            "--provider cpu or tensorrt or tensorrt-rtx or ort-tensorrt, or .* --target cuda",
        ),
        ("cuda", "fp16", "ort-tensorrt", "--provider cpu or cuda, or .* --target tensorrt"),
        ("cuda", "bf16", "cpu", "computes in bfloat16 .* --provider cuda, or .* --target cpu"),
        ("onnx", "bf16", "tensorrt-rtx", "--provider cpu, or .* --target tensorrt"),
    ],
)
def test_a_bundle_for_another_provider_is_refused(
    target: str, weights: str, provider: str, expected: str
) -> None:
    with pytest.raises(BackendError, match=expected):
        check_target(bundle_for(target, weights), provider)


def test_what_a_provider_runs_is_not_refused() -> None:
    for name, provider in PROVIDERS.items():
        for target in provider.targets:
            check_target(bundle_for(target, "fp16"), name)
    with pytest.raises(UsageError, match="runs whole bundles"):
        open_session(Path("vision.onnx"), provider="cuda", threads=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", GpuOptions()),
        ("device=1", GpuOptions(1)),
        ("memory=8GiB, device=2", GpuOptions(2, 8 << 30)),
        ("memory=1.5GB", GpuOptions(memory_bytes=1_500_000_000)),
        ("engine-cache=a/b,plugins=c.so", GpuOptions(engine_cache=Path("a/b"), plugins=Path("c.so"))),
    ],
)
def test_gpu_options(text: str, expected: GpuOptions) -> None:
    assert GpuOptions.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu=1", "expected KEY=VALUE with device, memory"),
        ("device", "expected KEY=VALUE"),
        ("device=", "expected KEY=VALUE"),
        ("device=0,device=1", "given twice"),
        ("device=-1", "expected the number of a GPU"),
        ("memory=8", "too few; give at least 64MiB"),
        ("memory=lots", "a size such as 8GiB"),
        ("memory=8XB", "a size such as 8GiB"),
        ("memory=9e9GB", "a size such as 8GiB"),
        (",", "expected KEY=VALUE"),
    ],
)
def test_bad_gpu_options(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        GpuOptions.parse(text)


@pytest.mark.parametrize(
    ("provider", "text", "refused"),
    [
        ("auto", "device=1,plugins=a.so", None),
        ("auto", "engine-cache=a", "engine-cache"),
        ("cpu", "device=1,engine-cache=a", None),  # a benchmark may compare with it
        ("cuda", "device=1,memory=1GiB", None),
        ("cuda", "plugins=a.so", "plugins"),
        ("ort-tensorrt", "device=1,memory=1GiB,engine-cache=a,plugins=a.so", None),
        ("tensorrt", "device=1,plugins=a.so", None),
        ("tensorrt", "memory=1GiB", "memory"),
        ("tensorrt-rtx", "device=1", None),
        ("tensorrt-rtx", "plugins=a.so", "plugins"),
    ],
)
def test_options_that_a_provider_takes(provider: str, text: str, refused: str | None) -> None:
    with (
        pytest.raises(UsageError, match=f"{refused!r}: the provider {provider} takes only")
        if refused
        else nullcontext()
    ):
        check_options(provider, GpuOptions.parse(text))
