"""Memory of a run: layouts, buffers that grow, and blocks that are used again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zreward.runtime.backends.tensorrt.device import DeviceMemoryError
from zreward.runtime.backends.tensorrt.memory import ALIGNMENT, Block, BlockPool, GrowingBuffer, Layout


class Heap:
    """Memory of `limit` bytes; addresses are never used twice."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit, self.live, self.allocated = limit, dict[int, int](), list[int]()

    def allocate(self, n_bytes: int) -> int:
        assert n_bytes % ALIGNMENT == 0
        if sum(self.live.values()) + n_bytes > self.limit:
            raise DeviceMemoryError("no memory left")
        address = 4096 * (len(self.allocated) + 1)
        self.live[address] = n_bytes
        self.allocated.append(n_bytes)
        return address

    def release(self, address: int) -> None:
        del self.live[address]


@pytest.fixture
def heap() -> Iterator[Heap]:
    return Heap()


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 5000), max_size=8))
def test_arrays_of_a_layout_are_aligned_and_apart(sizes: dict[str, int]) -> None:
    layout = Layout.of(sizes)
    ends = 0
    for name, n_bytes in sizes.items():
        assert layout.offsets[name] % ALIGNMENT == 0 and layout.offsets[name] >= ends
        ends = layout.offsets[name] + max(n_bytes, 1)  # an array without elements has an address of its own
    assert max(ends, 1) <= layout.total and layout.total % ALIGNMENT == 0
    assert layout.addresses(1024) == {name: 1024 + offset for name, offset in layout.offsets.items()}


def test_a_buffer_doubles_and_gives_back_first(heap: Heap) -> None:
    buffer = GrowingBuffer(heap.allocate, heap.release)
    first = buffer.reserve(1000)
    assert buffer.reserve(10) == buffer.reserve(1024) == first and heap.live == {first: 1024}
    second = buffer.reserve(1025)
    assert heap.live == {second: 2048}
    assert buffer.reserve(9000) != second and list(heap.live.values()) == [9216]


def test_a_buffer_that_cannot_double_takes_what_it_needs() -> None:
    heap = Heap(limit=3000)
    buffer = GrowingBuffer(heap.allocate, heap.release)
    buffer.reserve(2048)
    buffer.reserve(2049)
    assert list(heap.live.values()) == [2304]
    with pytest.raises(DeviceMemoryError):
        buffer.reserve(4000)
    assert not heap.live and buffer.n_bytes == 0
    assert buffer.reserve(100) and list(heap.live.values()) == [256]


def test_a_block_is_used_again_by_what_fits(heap: Heap) -> None:
    pool = BlockPool(heap.allocate, heap.release)
    block = pool.take(10_000)
    assert block.n_bytes == 12_544  # a quarter more
    address = block.address
    other = pool.take(10_000)
    assert other.address != address, "it is in use"
    del block
    again = pool.take(12_000)
    assert again.address == address
    del again
    small = pool.take(5_000)  # less than half
    assert small.address not in (address, other.address) and len(heap.allocated) == 3


def test_new_blocks_replace_smaller_idle_ones(heap: Heap) -> None:
    pool = BlockPool(heap.allocate, heap.release)
    held = pool.take(1_000)
    for n_bytes in (1_000, 2_000, 4_000, 8_000):
        pool.take(n_bytes)  # nobody keeps it
    assert sorted(heap.live.values()) == [held.n_bytes, 10_240]
    assert pool.drop_idle() == 10_240 and list(heap.live) == [held.address]


def test_idle_blocks_make_room_before_memory_is_missing() -> None:
    heap = Heap(limit=10_240)
    pool = BlockPool(heap.allocate, heap.release)
    pool.take(8_000)
    held = pool.take(3_000)  # the idle block is larger than twice this
    assert list(heap.live) == [held.address]
    with pytest.raises(DeviceMemoryError):
        pool.take(9_000)
    assert pool.take(5_000).n_bytes == 6_400


def test_blocks_come_back_from_any_thread() -> None:
    returned: deque[tuple[int, int]] = deque()
    blocks = [Block(address, 256, returned) for address in range(100)]
    threads = [threading.Thread(target=blocks.pop) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(address for _, address in returned) == list(range(100))
