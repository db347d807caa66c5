"""zreward.cuda_device: a driver that answers, one that does not, and none."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from zreward import cuda_device
from zreward.cuda_device import compute_capability
from zreward.errors import BackendError


class Driver:
    """The functions of libcuda that are called."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802  # NVIDIA's names
        return self.status

    def cuDeviceGet(self, handle: Any, device: int) -> int:  # noqa: N802
        handle._obj.value = device + 40
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:  # noqa: N802
        assert handle.value == 42
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"no CUDA-capable device is detected" if status == 100 else None
        return 0


def test_the_numbers_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert compute_capability(2) == "8.9"


@pytest.mark.parametrize(("status", "reason"), [(100, "no CUDA-capable device"), (7, "error 7")])
def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch, status: int, reason: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status))
    with pytest.raises(BackendError, match=f"no usable GPU .*{reason}.*nvidia-smi"):
        compute_capability()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "_LIBRARY", "libcuda-of-no-machine.so.1")
    with pytest.raises(BackendError, match="no CUDA driver on this machine"):
        compute_capability()
