"""A GPU as its driver describes it: its facts, its memory in use, and how fast it copies.

The driver's library is called directly, since a provider may come without cuda-bindings. Functions have the suffix
`_v2` where cuda.h gives them that name.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import byref, c_char, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass

from zreward.cuda_device import call_driver, compute_capability, driver_cuda_version, load_driver
from zreward.errors import BackendError

# CU_DEVICE_ATTRIBUTE_… of cuda.h
_MULTIPROCESSORS, _CLOCK_KHZ, _MEMORY_CLOCK_KHZ, _BUS_BITS, _L2_BYTES = 16, 13, 36, 37, 38

_COPIED_BYTES = 256 << 20
_COPIES, _ROUNDS = 8, 5


@dataclass(frozen=True)
class GpuFacts:
    """What the driver reports; a figure that it does not know is 0.

    Attributes:
        cuda_version: the latest that the driver supports.
        clock_khz: the highest of the multiprocessors.
        memory_clock_khz: the highest; memory transfers twice a clock.
    """

    name: str
    compute_capability: str
    cuda_version: str
    memory_bytes: int
    multiprocessors: int
    clock_khz: int
    memory_clock_khz: int
    memory_bus_bits: int
    l2_cache_bytes: int


def gpu_facts(device: int = 0) -> GpuFacts:
    """Of a GPU, by its number.

    Raises:
        BackendError: there is no driver, or no such GPU.
    """
    capability, driver = compute_capability(device), load_driver()
    handle = _handle(driver, device)
    name, total = (c_char * 256)(), c_size_t()
    major, minor = driver_cuda_version()
    call_driver(driver, "cuDeviceGetName", name, len(name), handle)
    call_driver(driver, "cuDeviceTotalMem_v2", byref(total), handle)

    def attribute(number: int) -> int:
        value = c_int()
        with suppress(BackendError):  # an attribute that this driver no longer has
            call_driver(driver, "cuDeviceGetAttribute", byref(value), number, handle)
        return value.value

    return GpuFacts(
        name=name.value.decode(errors="replace"),
        compute_capability=capability,
        cuda_version=f"{major}.{minor}",
        memory_bytes=total.value,
        multiprocessors=attribute(_MULTIPROCESSORS),
        clock_khz=attribute(_CLOCK_KHZ),
        memory_clock_khz=attribute(_MEMORY_CLOCK_KHZ),
        memory_bus_bits=attribute(_BUS_BITS),
        l2_cache_bytes=attribute(_L2_BYTES),
    )


def memory_in_use(device: int = 0) -> int:
    """Bytes of a GPU's memory that are taken, by any process; errors as `gpu_facts`."""
    driver = load_driver()
    with _primary_context(driver, device):
        free, total = _free_and_total(driver)
    return total - free


def copied_bytes_per_second(device: int = 0) -> float:
    """How fast a GPU copies within its own memory: bytes read and bytes written, the best of a few rounds.

    Raises:
        BackendError: there is no driver or GPU, or it has no memory left.
    """
    driver = load_driver()
    with _primary_context(driver, device):
        free, _ = _free_and_total(driver)
        n_bytes = min(_COPIED_BYTES, free // 8)
        address = c_uint64()
        call_driver(driver, "cuMemAlloc_v2", byref(address), c_size_t(2 * n_bytes))
        try:
            best = min(_seconds_of_copies(driver, address.value, n_bytes) for _ in range(_ROUNDS))
        finally:
            call_driver(driver, "cuMemFree_v2", address)
    return 2 * _COPIES * n_bytes / best


def _seconds_of_copies(driver: ctypes.CDLL, address: int, n_bytes: int) -> float:
    """Of copies of the first half of a block to the second."""
    source, target = c_uint64(address), c_uint64(address + n_bytes)
    call_driver(driver, "cuCtxSynchronize")
    start = time.perf_counter()
    for _ in range(_COPIES):
        call_driver(driver, "cuMemcpyDtoDAsync_v2", target, source, c_size_t(n_bytes), c_void_p(None))
    call_driver(driver, "cuCtxSynchronize")
    return time.perf_counter() - start


@contextmanager
def _primary_context(driver: ctypes.CDLL, device: int) -> Iterator[None]:
    """The context that all libraries of a process share, current in this thread."""
    handle, context = _handle(driver, device), c_void_p()
    call_driver(driver, "cuDevicePrimaryCtxRetain", byref(context), handle)
    try:
        call_driver(driver, "cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            call_driver(driver, "cuCtxPopCurrent_v2", byref(c_void_p()))
    finally:
        call_driver(driver, "cuDevicePrimaryCtxRelease_v2", handle)


def _handle(driver: ctypes.CDLL, device: int) -> c_int:
    handle = c_int()
    call_driver(driver, "cuInit", 0)
    call_driver(driver, "cuDeviceGet", byref(handle), device)
    return handle


def _free_and_total(driver: ctypes.CDLL) -> tuple[int, int]:
    free, total = c_size_t(), c_size_t()
    call_driver(driver, "cuMemGetInfo_v2", byref(free), byref(total))
    return free.value, total.value
