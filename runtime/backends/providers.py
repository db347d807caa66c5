"""What a bundle can be run by: the providers, whose bundles each of them runs, and which options of a GPU it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zreward.bundle import NARROW_TARGETS, Bundle
from zreward.errors import BackendError, UsageError
from zreward.runtime.backends.options import GpuOptions
from zreward.tensorrt_library import FLAVOURS


@dataclass(frozen=True)
class Provider:
    """One way to run a bundle.

    Attributes:
        targets: of the bundles that it runs; the first is the one to export for.
        gpu_options: keys of `GpuOptions.parse` that it takes.
    """

    targets: tuple[str, ...]
    gpu_options: tuple[str, ...] = ()


PROVIDERS: Mapping[str, Provider] = {
    "auto": Provider((), ("device", "memory", "plugins")),
    "cpu": Provider(("cpu", "cuda", "onnx", "tensorrt")),
    "cuda": Provider(("cuda",), ("device", "memory")),
    **{
        name: Provider(("tensorrt",), ("device", "plugins") if flavour.takes_plugins else ("device",))
        for name, flavour in FLAVOURS.items()
    },
    "ort-tensorrt": Provider(("tensorrt",), ("device", "memory", "engine-cache", "plugins")),
}
"""By name. "auto" is what a bundle was exported for, where that runs on this machine, else the CPU."""

ORT_PROVIDERS = ("cuda", "ort-tensorrt")
"""Those of ONNX Runtime that run on a GPU."""


def check_target(bundle: Bundle, provider: str) -> None:
    """Make sure that `provider`, which is not "auto", runs what `bundle` was exported to.

    Raises:
        BackendError: it does not; the message says what does, and how to export for this one.
    """
    target = bundle.manifest.target
    # ONNX Runtime has no products in bfloat16 on CPUs; graphs of other targets only store it.
    narrow = provider == "cpu" and bundle.manifest.weights == "bf16" and target in NARROW_TARGETS
    if target in PROVIDERS[provider].targets and not narrow:
        return
    others = [name for name, found in PROVIDERS.items() if target in found.targets and name != provider]
    what = f"computes in bfloat16 for the target {target}" if narrow else f"was exported for {target}"
    other = f"run it with --provider {' or '.join(others)}, or " if others else ""
    raise BackendError(
        f"{bundle.path}: this bundle {what}, which the provider {provider} cannot run; {other}make one with "
        f"`zreward export CHECKPOINT -o BUNDLE --target {PROVIDERS[provider].targets[0]}`"
    )


def check_options(provider: str, gpu: GpuOptions) -> None:
    """Make sure that `provider` takes the options of a GPU that were given.

    Raises:
        UsageError: it is none, or it does not. The CPU takes any and uses none, for a benchmark may compare with it.
    """
    if provider not in PROVIDERS:
        raise UsageError(f"unknown provider {provider!r}; this version has {', '.join(PROVIDERS)}")
    taken = PROVIDERS[provider].gpu_options
    refused = [key for key in gpu.given if key not in taken]
    if refused and provider != "cpu":
        raise UsageError(f"GPU option {refused[0]!r}: the provider {provider} takes only {', '.join(taken)}")
