"""What a proof of conformance is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, field

from zreward.errors import UsageError
from zreward.runtime.backends.options import GpuOptions
from zreward.runtime.backends.providers import PROVIDERS, check_options

_LEAST = {"cycles": 2, "repetitions": 1, "threads": 1}
_MOST = {"cycles": 1000, "repetitions": 1000, "threads": 1024}


@dataclass(frozen=True)
class ConformancePlan:
    """What is examined, and how thoroughly.

    Attributes:
        provider: as for `open_graphs`, but never "auto".
        gpu: how it is used. Its `plugins` are TensorRT's library; None is the one that `zreward.plugins.find_library`
            finds, and for ONNX Runtime none.
        without_plugins: leave the engine with plugins out.
        build: build engines anew, also where there are some.
        cycles: rounds over all sizes; memory must not grow after the first.
        repetitions: of the stages that are timed, after those that warm up.
        threads: of the CPU, for the provider "cpu"; None lets the backend choose.

    Raises:
        UsageError: an unknown provider, a number out of range, an option that the provider does not take, or options
            that contradict each other.
    """

    provider: str
    gpu: GpuOptions = field(default_factory=GpuOptions)
    without_plugins: bool = False
    build: bool = False
    cycles: int = 3
    repetitions: int = 10
    threads: int | None = None

    def __post_init__(self) -> None:
        known = [name for name in PROVIDERS if name != "auto"]
        if self.provider not in known:
            raise UsageError(
                f"unknown provider {self.provider!r}; name the one to examine: {', '.join(known)}"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= _MOST[name]:
                raise UsageError(f"{name} must be {least} to {_MOST[name]:,}, not {value}")
        check_options(self.provider, self.gpu)
        if self.provider == "cpu" and self.gpu.given:
            raise UsageError("the provider cpu uses no GPU; leave --gpu out")
        if self.gpu.plugins is not None and self.without_plugins:
            raise UsageError("--gpu plugins and --no-plugins contradict each other; leave one of them out")
