"""How a GPU is used: which one, and what may lie on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zreward.errors import UsageError

_UNITS = {"": 1, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 10**6, "GB": 10**9}
_LEAST_MEMORY = 64 << 20
_FIELDS = {"device": "device", "memory": "memory_bytes", "engine-cache": "engine_cache", "plugins": "plugins"}
"""Of the text, by key."""


@dataclass(frozen=True)
class GpuOptions:
    """Options of the providers that run on a GPU.

    Attributes:
        device: number of the GPU, as CUDA counts them.
        memory_bytes: most memory that ONNX Runtime's arena takes for each graph, weights included; None: what there
            is.
        engine_cache: existing folder where ONNX Runtime's TensorRT provider keeps its engines; None: they are built
            again in every process.
        plugins: library of TensorRT plugins that take over operators. None: for an engine the one that
            `zreward.plugins.find_library` finds, if it was built with that; for ONNX Runtime none.

    Raises:
        UsageError: a value is out of range.
    """

    device: int = 0
    memory_bytes: int | None = None
    engine_cache: Path | None = None
    plugins: Path | None = None

    def __post_init__(self) -> None:
        if self.device < 0:
            raise UsageError(f"GPU {self.device}: GPUs are counted from 0")
        if self.memory_bytes is not None and self.memory_bytes < _LEAST_MEMORY:
            raise UsageError(
                f"{self.memory_bytes:,} bytes of GPU memory are too few; give at least {_LEAST_MEMORY >> 20}MiB"
            )

    @property
    def given(self) -> tuple[str, ...]:
        """Keys of the options that are not what they are by default."""
        default = GpuOptions()
        return tuple(key for key, name in _FIELDS.items() if getattr(self, name) != getattr(default, name))

    @staticmethod
    def parse(text: str) -> GpuOptions:
        """Read `device=1,memory=8GiB,engine-cache=DIR,plugins=FILE`, each of them optional.

        Raises:
            UsageError: an unknown or repeated key, or a value that is none.
        """
        values: dict[str, str] = {}
        for part in text.split(",") if text.strip() else []:
            key, sign, value = (piece.strip() for piece in part.partition("="))
            if key not in _FIELDS or not sign or not value:
                raise UsageError(f"GPU option {part.strip()!r}: expected KEY=VALUE with {', '.join(_FIELDS)}")
            if key in values:
                raise UsageError(f"GPU option {key!r} is given twice")
            values[key] = value
        device = values.get("device", "0")
        if not device.isdecimal():
            raise UsageError(f"GPU option device={device!r}: expected the number of a GPU, such as 0")
        return GpuOptions(
            device=int(device),
            memory_bytes=_bytes(values["memory"]) if "memory" in values else None,
            engine_cache=Path(values["engine-cache"]) if "engine-cache" in values else None,
            plugins=Path(values["plugins"]) if "plugins" in values else None,
        )


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"GPU option memory={text!r}: expected a size such as 8GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2]])
