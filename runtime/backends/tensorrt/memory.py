"""Memory of a run: buffers that grow and stay, and blocks for states that outlive it.

Inputs are packed into one page-locked buffer and copied at once, results likewise. A state stays on the GPU as long as
somebody holds its arrays (`DeviceArray`), and is an input of the next runs as it lies there.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zreward.runtime.backends.tensorrt.device import Device, DeviceMemoryError, view

ALIGNMENT = 256
"""Bytes: TensorRT's own for memory that it is given."""

Shape = tuple[int, ...]
Described = Mapping[str, tuple[Shape, "np.dtype[Any]"]]
"""Shape and type of arrays, by name."""


@dataclass(frozen=True)
class Layout:
    """Arrays behind each other.

    Attributes:
        offsets: of each, in bytes.
        total: bytes of all; not zero, since TensorRT wants an address for an array without elements too.
    """

    offsets: Mapping[str, int]
    total: int

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Layout:
        """Of arrays of these sizes in bytes."""
        offsets, end = {}, 0
        for name, n_bytes in sizes.items():
            offsets[name] = end
            end += _aligned(max(n_bytes, 1))
        return Layout(offsets, max(end, ALIGNMENT))

    def addresses(self, base: int) -> dict[str, int]:
        """Of each array."""
        return {name: base + offset for name, offset in self.offsets.items()}


class GrowingBuffer:
    """One piece of memory that is there for every run; it at least doubles when it has to grow.

    Its content does not survive that.
    """

    def __init__(self, allocate: Callable[[int], int], release: Callable[[int], None]) -> None:
        self._allocate, self._release = allocate, release
        self._address = self.n_bytes = 0

    def reserve(self, n_bytes: int) -> int:
        """The address, of at least `n_bytes`.

        Raises:
            DeviceMemoryError: there is not so much.
        """
        if n_bytes > self.n_bytes:
            doubled = 2 * self.n_bytes
            if self.n_bytes:
                self.n_bytes = 0
                self._release(self._address)
            self._address, self.n_bytes = self._grown(_aligned(n_bytes), doubled)
        return self._address

    def _grown(self, needed: int, wanted: int) -> tuple[int, int]:
        if wanted > needed:
            try:
                return self._allocate(wanted), wanted
            except DeviceMemoryError:
                pass
        return self._allocate(needed), needed


class Block:
    """Memory of a pool, which it goes back to with its last reference."""

    def __init__(self, address: int, n_bytes: int, returned: deque[tuple[int, int]]) -> None:
        self.address, self.n_bytes, self._returned = address, n_bytes, returned

    def __del__(self) -> None:
        self._returned.append(
            (self.n_bytes, self.address)
        )  # from any thread, at any time: nothing else is safe


class BlockPool:
    """Blocks of a GPU's memory that are used again.

    A request takes the smallest idle block of up to twice its size, so that runs of one shape find their blocks, and
    captured graphs their addresses. A new block has room for a quarter more, and replaces the idle ones that are
    smaller.
    """

    def __init__(self, allocate: Callable[[int], int], release: Callable[[int], None]) -> None:
        self._allocate, self._release = allocate, release
        self._idle: list[tuple[int, int]] = []  # size and address, sorted
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, n_bytes: int) -> Block:
        """A block of at least `n_bytes`.

        Raises:
            DeviceMemoryError: there is none, even with the idle ones given back.
        """
        self._collect()
        for index, (size, address) in enumerate(self._idle):
            if n_bytes <= size <= 2 * max(n_bytes, ALIGNMENT):
                del self._idle[index]
                return Block(address, size, self._returned)
        self.drop_idle(below=n_bytes)
        size = _aligned(n_bytes + n_bytes // 4)
        try:
            address = self._allocate(size)
        except DeviceMemoryError:
            self.drop_idle()
            size = _aligned(n_bytes)
            address = self._allocate(size)
        return Block(address, size, self._returned)

    def drop_idle(self, *, below: int | None = None) -> int:
        """Give back idle blocks, or those of fewer bytes than `below`; returns their bytes."""
        self._collect()
        dropped = [(size, address) for size, address in self._idle if below is None or size < below]
        for block in dropped:
            self._idle.remove(block)
            self._release(block[1])
        return sum(size for size, _ in dropped)

    def _collect(self) -> None:
        while self._returned:
            insort(self._idle, self._returned.popleft())


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array in a GPU's memory. NumPy reads it like any other, by copying it to the host.

    Attributes:
        address: of the first element.
        shape: sizes of its axes.
        dtype: of its elements.
        device: whose memory it is.
        block: that holds it, with others.
    """

    address: int
    shape: Shape
    dtype: np.dtype[Any]
    device: Device
    block: Block

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array of a GPU's memory cannot be read without a copy")
        host = np.empty(self.shape, self.dtype)
        if host.nbytes:
            self.device.read(self.address, host)
        return host if dtype is None else host.astype(dtype, copy=False)


class Memory:
    """What runs on one device share, one after the other.

    Attributes:
        states: blocks of what is kept.
        unread: for outputs that nobody asked for.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.states = BlockPool(device.allocate, device.release)
        on_device = (self._allocate, device.release)
        on_host = (device.allocate_host, device.release_host)
        self._inputs, self._staged = GrowingBuffer(*on_device), GrowingBuffer(*on_host)
        self._results, self._fetched = GrowingBuffer(*on_device), GrowingBuffer(*on_host)
        self.unread = GrowingBuffer(*on_device)

    def place_inputs(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """Addresses of the inputs: arrays of this device where they lie, the others in a copy, which is enqueued."""
        here = {
            n: a.address for n, a in arrays.items() if isinstance(a, DeviceArray) and a.device is self.device
        }
        copied = {name: np.asarray(array) for name, array in arrays.items() if name not in here}
        if not copied:
            return here
        layout = Layout.of({name: array.nbytes for name, array in copied.items()})
        base, host = self._inputs.reserve(layout.total), self._staged.reserve(layout.total)
        staged = view(host, layout.total)
        for name, array in copied.items():
            np.copyto(_array_in(staged, layout.offsets[name], array.shape, array.dtype), array)
        self.device.copy_to_device(base, host, layout.total)
        return here | layout.addresses(base)

    def place_results(self, described: Described) -> dict[str, int]:
        """Addresses of outputs that will be fetched."""
        if not described:
            return {}
        layout = _layout_of(described)
        self._fetched.reserve(layout.total)
        return layout.addresses(self._results.reserve(layout.total))

    def fetch(self, described: Described) -> dict[str, NDArray[Any]]:
        """Copy what `place_results` placed last to the host, and wait for everything."""
        if not described:
            self.device.synchronize()
            return {}
        layout = _layout_of(described)
        base, host = self._results.reserve(layout.total), self._fetched.reserve(layout.total)
        self.device.copy_to_host(host, base, layout.total)
        self.device.synchronize()
        fetched = view(host, layout.total)
        return {
            name: _array_in(fetched, layout.offsets[name], shape, dtype).copy()
            for name, (shape, dtype) in described.items()
        }

    def _allocate(self, n_bytes: int) -> int:
        try:
            return self.device.allocate(n_bytes)
        except DeviceMemoryError:
            if not self.states.drop_idle():
                raise
            return self.device.allocate(n_bytes)


def n_bytes(shape: Iterable[int], dtype: np.dtype[Any]) -> int:
    """Of an array."""
    return int(np.prod(tuple(shape), dtype=np.int64)) * dtype.itemsize


def _layout_of(described: Described) -> Layout:
    return Layout.of({name: n_bytes(*entry) for name, entry in described.items()})


def _array_in(data: NDArray[np.uint8], offset: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
    return data[offset : offset + n_bytes(shape, dtype)].view(dtype).reshape(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
