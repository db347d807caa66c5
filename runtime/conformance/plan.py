"""What a proof of conformance is asked for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zreward.errors import UsageError
from zreward.runtime.backends import PROVIDERS

_LEAST = {"cycles": 2, "repetitions": 1, "threads": 1, "device": 0}
_MOST = {"cycles": 1000, "repetitions": 1000, "threads": 1024, "device": 1023}


@dataclass(frozen=True)
class ConformancePlan:
    """What is examined, and how thoroughly.

    Attributes:
        provider: as for `open_graphs`, but never "auto".
        plugins: library of plugins for TensorRT; None: the one that `zreward.plugins.find_library` finds.
        without_plugins: leave the engine with plugins out.
        build: build engines anew, also where there are some.
        cycles: rounds over all sizes; memory must not grow after the first.
        repetitions: of the stages that are timed, after those that warm up.
        threads: of the CPU, for the provider "cpu"; None lets the backend choose.
        device: number of the GPU, as CUDA counts.

    Raises:
        UsageError: an unknown provider, a number out of range, or options that contradict each other.
    """

    provider: str
    plugins: Path | None = None
    without_plugins: bool = False
    build: bool = False
    cycles: int = 3
    repetitions: int = 10
    threads: int | None = None
    device: int = 0

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
        if self.plugins is not None and self.without_plugins:
            raise UsageError("--plugins and --no-plugins contradict each other; leave one of them out")
