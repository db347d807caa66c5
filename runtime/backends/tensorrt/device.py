"""One GPU through its driver: the primary context, one stream, memory, copies, and captured graphs.

The driver is called by way of cuda-bindings, so nothing of CUDA needs to be installed besides it. TensorRT uses the
same primary context. One thread at a time works on a device (`Device.in_use`), and what it enqueues is finished before
the next one begins; so memory that nobody holds any more is idle, and may be given to the next run.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zreward.errors import BackendError, UsageError

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY of cuda.h
_CLOSED = "this engine is closed; open the bundle again"

Call = Callable[..., Any]


class DeviceError(BackendError):
    """The driver refused a call; `reason` has the call and the driver's words."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the GPU failed ({reason}); after an error like this a process may not be able to use it any more, so "
            "start again, and look at it with `nvidia-smi` if it comes back"
        )
        self.reason = reason


class DeviceMemoryError(BackendError):
    """The GPU has no memory left."""


class Device:
    """A GPU. Safe to share between threads.

    What it holds is given back by `close`, or when nothing refers to it any more.

    Args:
        ordinal: its number, as CUDA counts GPUs.

    Raises:
        BackendError: cuda-bindings is not installed, or the driver has no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._call, self._modes = _driver()
        self._lock = threading.RLock()
        self._held: dict[tuple[str, int], Any] = {}
        self._stream: Any = None
        self._call("cuInit", 0)
        gpu = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", gpu)
        self._held["cuDevicePrimaryCtxRelease", int(gpu)] = gpu
        self._finalizer = weakref.finalize(self, _give_back, self._call, self._context, self._held)
        with self.in_use():
            self._stream = self._call(
                "cuStreamCreate", int(self._modes.CUstream_flags.CU_STREAM_NON_BLOCKING)
            )
            self._hold("cuStreamDestroy", self._stream)

    @property
    def stream(self) -> int:
        """Handle of the stream that everything runs on."""
        return int(self._stream)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The calling thread has the GPU to itself inside; what it has enqueued is finished when an error leaves.

        Raises:
            UsageError: the device is closed.
        """
        with self._lock:
            if self.closed:
                raise UsageError(_CLOSED)
            self._call("cuCtxPushCurrent", self._context)
            try:
                yield
            except BaseException:
                with suppress(BackendError):  # what failed first is what is told
                    self.synchronize()
                raise
            finally:
                self._call("cuCtxPopCurrent")

    def allocate(self, n_bytes: int) -> int:
        """Address of new memory of the GPU.

        Raises:
            DeviceMemoryError: there is not so much left.
        """
        address = self._call("cuMemAlloc", n_bytes, explain=lambda: self._memory_left(n_bytes))
        return self._hold("cuMemFree", address)

    def release(self, address: int) -> None:
        """Give back what `allocate` returned."""
        self._free("cuMemFree", address)

    def allocate_host(self, n_bytes: int) -> int:
        """Address of new page-locked memory of the host, which the GPU copies from and to on its own."""
        address = self._call(
            "cuMemHostAlloc", n_bytes, 0, explain=lambda: f"{n_bytes:,} bytes of page-locked memory"
        )
        return self._hold("cuMemFreeHost", address)

    def release_host(self, address: int) -> None:
        """Give back what `allocate_host` returned."""
        self._free("cuMemFreeHost", address)

    def copy_to_device(self, address: int, host: int, n_bytes: int) -> None:
        """Enqueue a copy."""
        self._call("cuMemcpyHtoDAsync", address, host, n_bytes, self._stream)

    def copy_to_host(self, host: int, address: int, n_bytes: int) -> None:
        """Enqueue a copy."""
        self._call("cuMemcpyDtoHAsync", host, address, n_bytes, self._stream)

    def synchronize(self) -> None:
        """Wait for what is enqueued.

        Raises:
            BackendError: some of it failed.
        """
        if self._stream is not None:
            self._call("cuStreamSynchronize", self._stream)

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Fill a contiguous `array` from the device's memory, and wait for it."""
        with self.in_use():
            self.copy_to_host(array.ctypes.data, address, array.nbytes)
            self.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """What `enqueue` would enqueue, as a graph that `launch` runs; nothing of it runs now.

        Raises:
            BackendError: something in it cannot be captured.
        """
        # Thread-local: other threads of the process may allocate memory meanwhile.
        mode = self._modes.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(BackendError):  # the stream must leave the capture, which has failed already
                self._destroy_graph(self._call("cuStreamEndCapture", self._stream))
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._destroy_graph(graph)
        self._hold("cuGraphExecDestroy", executable)
        return executable

    def launch(self, executable: Any) -> None:
        """Enqueue what was captured."""
        self._call("cuGraphLaunch", executable, self._stream)

    def forget(self, executable: Any) -> None:
        """Give back what `capture` returned."""
        self._free("cuGraphExecDestroy", executable)

    def memory(self) -> tuple[int, int]:
        """Bytes that are free and that there are, of the GPU."""
        with self.in_use():
            free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def close(self, first: Callable[[], None] = lambda: None) -> None:
        """Give everything back; closing twice is no error. Waits for a run of another thread.

        Args:
            first: is called before, with the device in use.
        """
        with self._lock:
            if not self.closed:
                with self.in_use():
                    first()
                self._finalizer()

    def _hold(self, release: str, handle: Any) -> int:
        self._held[release, int(handle)] = handle
        return int(handle)

    def _free(self, release: str, handle: Any) -> None:
        self._call(release, self._held.pop((release, int(handle))))

    def _destroy_graph(self, graph: Any) -> None:
        if int(graph):
            self._call("cuGraphDestroy", graph)

    def _memory_left(self, n_bytes: int) -> str:
        free, total = self._call("cuMemGetInfo")
        return f"{n_bytes / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} of {total / 1e6:,.0f} MB are free"


def view(host: int, n_bytes: int) -> NDArray[np.uint8]:
    """The bytes of host memory at an address, uint8 [n_bytes]."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(host))


def _give_back(call: Call, context: Any, held: dict[tuple[str, int], Any]) -> None:
    """Release everything, what was taken last first; what a broken context refuses is gone with it."""
    with suppress(BackendError):
        call("cuCtxPushCurrent", context)
    while held:
        (release, _), handle = held.popitem()
        if not held:  # the context itself
            with suppress(BackendError):
                call("cuCtxPopCurrent")
        with suppress(BackendError):
            call(release, handle)


def _driver() -> tuple[Call, Any]:
    """A function that calls the driver by name, and the module that has the driver's constants.

    The function returns what the driver gives, as one value where there is one. Its `explain` says what was asked for,
    where memory is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings cannot be imported ({error}); install it with `pip install 'zreward[tensorrt]'`"
        ) from None

    def call(name: str, *arguments: Any, explain: Callable[[], str] | None = None) -> Any:
        try:
            status, *values = getattr(driver, name)(*arguments)
        except RuntimeError as error:  # of the loader: no driver, or one that lacks the function
            raise BackendError(f"the CUDA driver lacks {name} ({error}); install a newer one") from None
        if int(status) == _OUT_OF_MEMORY:
            what = f" ({explain()})" if explain else ""
            raise DeviceMemoryError(
                f"the GPU has no memory left{what}; end what else runs on it, which `nvidia-smi` shows, score fewer "
                "images at once, or build an engine for fewer with `zreward engine BUNDLE --images N --force`"
            )
        if int(status):
            raise DeviceError(f"{name}: {_text(driver, status)}")
        return values[0] if len(values) == 1 else tuple(values)

    return call, driver


def _text(driver: Any, status: Any) -> str:
    text = driver.cuGetErrorString(status)[1]
    return text.decode() if text else f"error {int(status)}"
