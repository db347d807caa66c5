"""What the CUDA driver says of a GPU, without any package of CUDA: the driver's library is all that is loaded."""

from __future__ import annotations

import ctypes
import sys

from zreward.errors import BackendError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def compute_capability(device: int = 0) -> str:
    """The compute capability of a GPU, for example "8.9".

    Raises:
        BackendError: there is no driver, or no such GPU.
    """
    driver = load_driver()
    call_driver(driver, "cuInit", 0)
    handle = ctypes.c_int()
    call_driver(driver, "cuDeviceGet", ctypes.byref(handle), device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        call_driver(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


def driver_cuda_version() -> tuple[int, int]:
    """The latest version of CUDA that the driver supports, for example (13, 0).

    Raises:
        BackendError: there is no driver.
    """
    version = ctypes.c_int()
    call_driver(load_driver(), "cuDriverGetVersion", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def load_driver() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        BackendError: there is none.
    """
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise BackendError(
            f"no CUDA driver on this machine ({error}); install NVIDIA's driver, or run where there is a GPU"
        ) from None


def call_driver(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call a function of the driver; whole numbers that are not C's int must come as objects of ctypes.

    Raises:
        BackendError: it refuses; the message has its words.
    """
    status = int(getattr(driver, name)(*arguments))
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {status}"
        raise BackendError(
            f"the CUDA driver has no usable GPU ({name}: {reason}); check it with `nvidia-smi`"
        )
