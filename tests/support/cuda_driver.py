"""A CUDA driver whose GPU is the host's memory, behind the real cuda-bindings.

`compile_driver` makes a libcuda.so.1 that asks a table for its functions, and `FakeDriver` fills the table with methods
of its own. It is strict where a GPU would be silent: work waits in its stream until somebody synchronizes, memory is
poisoned when it is given out and when it comes back, copies must stay within one live allocation, and calls need a
current context. What breaks a rule is refused, and remembered in `violations`.
"""

# ruff: noqa: N802  # the driver's own names

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

_SOURCE = """
#include <stddef.h>
#include <string.h>
static struct { const char *name; void *function; } table[64];
static int count;
void driver_register(const char *name, void *function) {
  table[count].name = strdup(name); table[count++].function = function; }
static void *find(const char *name) {
  for (int i = 0; i < count; ++i) if (!strcmp(table[i].name, name)) return table[i].function;
  return 0; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
  *function = find(name); return *function ? 0 : 500; }
int cuInit(unsigned flags) { return ((int (*)(unsigned))find("cuInit"))(flags); }
int cuDeviceGet(int *d, int n) { return ((int (*)(int *, int))find("cuDeviceGet"))(d, n); }
int cuDeviceGetAttribute(int *v, int a, int d) {
  return ((int (*)(int *, int, int))find("cuDeviceGetAttribute"))(v, a, d); }
int cuGetErrorString(int e, const char **s) {
  return ((int (*)(int, const char **))find("cuGetErrorString"))(e, s); }
typedef unsigned long long u64;
#define CALL(exported, name, parameters, types, ...) \\
  int exported parameters { int (*call) types = (int (*) types)find(name); return call ? call(__VA_ARGS__) : 500; }
CALL(cuDeviceGetName, "cuDeviceGetName", (char *s, int n, int d), (char *, int, int), s, n, d)
CALL(cuDeviceTotalMem_v2, "cuDeviceTotalMem", (size_t *n, int d), (size_t *, int), n, d)
CALL(cuDriverGetVersion, "cuDriverGetVersion", (int *v), (int *), v)
CALL(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **c, int d), (void **, int), c, d)
CALL(cuDevicePrimaryCtxRelease_v2, "cuDevicePrimaryCtxRelease", (int d), (int), d)
CALL(cuCtxPushCurrent_v2, "cuCtxPushCurrent", (void *c), (void *), c)
CALL(cuCtxPopCurrent_v2, "cuCtxPopCurrent", (void **c), (void **), c)
CALL(cuCtxSynchronize, "cuCtxSynchronize", (void), (void))
CALL(cuMemGetInfo_v2, "cuMemGetInfo", (size_t *f, size_t *t), (size_t *, size_t *), f, t)
CALL(cuMemAlloc_v2, "cuMemAlloc", (u64 *a, size_t n), (u64 *, size_t), a, n)
CALL(cuMemFree_v2, "cuMemFree", (u64 a), (u64), a)
#define COPY_TYPES (u64, u64, size_t, void *)
CALL(cuMemcpyDtoDAsync_v2, "cuMemcpyDtoDAsync", (u64 t, u64 f, size_t n, void *s), COPY_TYPES, t, f, n, s)
"""

_HANDLE = POINTER(c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease": (c_int,),
    "cuCtxPushCurrent": (c_void_p,),
    "cuCtxPopCurrent": (_HANDLE,),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuMemAlloc": (POINTER(c_uint64), c_size_t),
    "cuMemFree": (c_uint64,),
    "cuMemGetInfo": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem": (POINTER(c_size_t), c_int),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuCtxSynchronize": (),
    "cuMemcpyDtoDAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
}

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_DEVICE = 0, 1, 2, 100, 101
INVALID_CONTEXT, ILLEGAL_ADDRESS, CAPTURE_INVALIDATED = 201, 700, 901
_TEXTS = {
    INVALID_VALUE: b"invalid argument",
    OUT_OF_MEMORY: b"out of memory",
    NO_DEVICE: b"no CUDA-capable device is detected",
    INVALID_DEVICE: b"invalid device ordinal",
    INVALID_CONTEXT: b"invalid device context",
    ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
    CAPTURE_INVALIDATED: b"operation failed due to a previous error during capture",
}
_WITHOUT_CONTEXT = (
    "cuInit",
    "cuDeviceGetName",
    "cuDeviceTotalMem",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuGetErrorString",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease",
    "cuCtxPushCurrent",
)
_POISON, _ALIGNMENT = 0xA5, 256
_CONTEXT = 0xC0

Work = Callable[[], None]


def compile_driver(folder: Path) -> Path:
    """A libcuda.so.1 in `folder`, for LD_LIBRARY_PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "driver.c").write_text(_SOURCE)
    library = folder / "libcuda.so.1"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(library),
        str(folder / "driver.c"),
    ]
    subprocess.run(command, check=True)
    return folder


class FakeDriver:
    """The functions of one process; `reset` before each scenario.

    Args:
        without: functions that the driver does not have.

    Attributes:
        calls: name and arguments of every call that needs a context, in order; handles that are returned are left out.
        failures: statuses that the next calls of a name return, in order, in place of working.
        violations: rules that were broken.
        memory_bytes: of a GPU.
        capabilities: compute capability of each GPU.
        attributes: of a GPU, by the numbers of cuda.h: multiprocessors, clocks, width of the memory, cache.
        retained: the GPUs whose primary contexts are held.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._lock, self._local = threading.RLock(), threading.local()
        self._kept = []
        for name, types in SIGNATURES.items():
            if name in without:
                continue
            function = ctypes.CFUNCTYPE(c_int, *types)(self._entry(name))
            self._kept.append(function)
            library.driver_register(name.encode(), ctypes.cast(function, c_void_p))
        self.reset()

    def reset(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failures: dict[str, list[int]] = {}
        self.violations: list[str] = []
        self.memory_bytes = 1 << 30
        self.capabilities = ((8, 9), (9, 0))
        self.attributes = {16: 58, 13: 2_040_000, 36: 6_251_000, 37: 192, 38: 50_331_648}
        self.retained: list[int] = []
        self._next = 0x1000
        self._device: dict[int, np.ndarray[Any, Any]] = {}
        self._pinned: dict[int, np.ndarray[Any, Any]] = {}
        self._freed: list[np.ndarray[Any, Any]] = []
        self._streams: dict[int, list[Work]] = {}
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}

    def live(self) -> dict[str, int]:
        """How many things of each kind are held."""
        return {
            "device": len(self._device),
            "pinned": len(self._pinned),
            "streams": len(self._streams),
            "graphs": len(self._graphs) + len(self._executables),
            "contexts": len(self.retained),
        }

    def used_bytes(self) -> int:
        return sum(len(memory) - _ALIGNMENT for memory in self._device.values())

    def is_device(self, address: int, n_bytes: int) -> bool:
        """Whether these bytes lie in one live allocation of the GPU."""
        return _within(self._device, address, n_bytes)

    def is_pinned(self, address: int, n_bytes: int) -> bool:
        return _within(self._pinned, address, n_bytes)

    def capturing(self, stream: int) -> bool:
        return stream in self._captures

    def enqueue(self, stream: int, work: Work) -> None:
        """What a kernel launch does: the work waits in the stream, or goes into the graph that is captured."""
        with self._lock:
            self._captures.get(stream, self._streams[stream]).append(work)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of the calls of this name."""
        return [call[1:] for call in self.calls if call[0] == name]

    def _entry(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            with self._lock:
                return self._called(name, arguments)

        return call

    def _called(self, name: str, arguments: tuple[Any, ...]) -> int:
        if self.failures.get(name):
            status = self.failures[name].pop(0)
            if status:
                if name == "cuStreamEndCapture":  # which ends it whatever it says
                    self._captures.pop(arguments[0])
                return status
        if name not in _WITHOUT_CONTEXT:
            if not self._stack():
                self.violations.append(f"{name} without a current context")
                return INVALID_CONTEXT
            self.calls.append((name, *(a for a in arguments if isinstance(a, int | None))))
        try:
            status = getattr(self, f"_{name}")(*arguments)
        except Exception as error:
            self.violations.append(f"{name}: {error!r}")
            return INVALID_VALUE
        return status or SUCCESS

    def _stack(self) -> list[int]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[int] = self._local.stack
        return stack

    def _new(self) -> int:
        self._next += 0x10
        return self._next

    def _cuInit(self, flags: int) -> None:
        pass

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal
        return SUCCESS if ordinal < len(self.capabilities) else INVALID_DEVICE

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int | None:
        major, minor = self.capabilities[device]
        found = {75: major, 76: minor, **self.attributes}
        if attribute not in found:
            return INVALID_VALUE
        value[0] = found[attribute]
        return None

    def _cuDeviceGetName(self, text: int, length: int, device: int) -> None:
        name = b"A GPU of the host's memory\0"
        assert length >= len(name)
        ctypes.memmove(text, name, len(name))

    def _cuDeviceTotalMem(self, n_bytes: Any, device: int) -> None:
        n_bytes[0] = self.memory_bytes

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 13_000

    def _cuGetErrorString(self, status: int, text: Any) -> int:
        text[0] = _TEXTS.get(status)
        return SUCCESS if status in _TEXTS else INVALID_VALUE

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        self.retained.append(device)
        context[0] = _CONTEXT + device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        assert not self._stack()
        self.retained.remove(device)

    def _cuCtxPushCurrent(self, context: int) -> None:
        assert context - _CONTEXT in self.retained
        self._stack().append(context)

    def _cuCtxPopCurrent(self, context: Any) -> None:
        context[0] = self._stack().pop()

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1, "a stream that waits for the default stream"
        stream[0] = self._new()
        self._streams[stream[0]] = []

    def _cuStreamDestroy(self, stream: int) -> None:
        assert not self._streams.pop(stream), "work was lost"

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert stream not in self._captures, "a stream that is captured cannot be waited for"
        work = self._streams[stream]
        while work:
            work.pop(0)()

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert stream in self._streams and stream not in self._captures
        assert mode == 1, "not thread-local"
        self._captures[stream] = []

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        graph[0] = self._new()
        self._graphs[graph[0]] = self._captures.pop(stream)

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> None:
        executable[0] = self._new()
        self._executables[executable[0]] = list(self._graphs[graph])

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        self._streams[stream] += self._executables[executable]

    def _cuGraphDestroy(self, graph: int) -> None:
        del self._graphs[graph]

    def _cuGraphExecDestroy(self, executable: int) -> None:
        del self._executables[executable]

    def _cuMemAlloc(self, address: Any, n_bytes: int) -> int | None:
        assert n_bytes > 0
        if self.used_bytes() + n_bytes > self.memory_bytes:
            return OUT_OF_MEMORY
        address[0] = _put(self._device, n_bytes)
        return None

    def _cuMemFree(self, address: int) -> None:
        assert not any(self._streams.values()), "memory was freed under work that waits"
        freed = self._device.pop(address)
        freed[:] = _POISON
        self._freed.append(freed)  # kept, so that no later allocation has its address

    def _cuMemGetInfo(self, free: Any, total: Any) -> None:
        free[0], total[0] = self.memory_bytes - self.used_bytes(), self.memory_bytes

    def _cuMemHostAlloc(self, address: Any, n_bytes: int, flags: int) -> None:
        address[0] = _put(self._pinned, n_bytes)

    def _cuMemFreeHost(self, address: int) -> None:
        assert not any(self._streams.values()), "memory was freed under work that waits"
        self._pinned.pop(address)[:] = _POISON

    def _cuCtxSynchronize(self) -> None:
        pass

    def _cuMemcpyDtoDAsync(self, to: int, source: int, n_bytes: int, stream: int) -> None:
        assert stream is None and self.is_device(to, n_bytes) and self.is_device(source, n_bytes)
        _copy(to, source, n_bytes)

    def _cuMemcpyHtoDAsync(self, to: int, host: int, n_bytes: int, stream: int) -> None:
        assert self.is_device(to, n_bytes) and self.is_pinned(host, n_bytes)
        self.enqueue(stream, lambda: _copy(to, host, n_bytes))

    def _cuMemcpyDtoHAsync(self, host: int, address: int, n_bytes: int, stream: int) -> None:
        assert self.is_device(address, n_bytes)
        self.enqueue(stream, lambda: _copy(host, address, n_bytes))


def _put(memories: dict[int, Any], n_bytes: int) -> int:
    memory = np.full(n_bytes + _ALIGNMENT, _POISON, np.uint8)
    address = -(-memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    memories[address] = memory
    return address


def _within(memories: dict[int, Any], address: int, n_bytes: int) -> bool:
    return any(
        start <= address and address + n_bytes <= start + len(memory) - _ALIGNMENT
        for start, memory in memories.items()
    )


def _copy(to: int, source: int, n_bytes: int) -> None:
    ctypes.memmove(to, source, n_bytes)
