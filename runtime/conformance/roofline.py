"""The least time of each stage: its operations at the device's rate, or its bytes at the device's bandwidth.

Operations are those that the manifest counts, as in `zreward.runtime.bench.bound`. Bytes are the weights of a graph
once a run, and the states that a run reads and leaves; where all of these fit into the device's last cache they need
not come from its memory, and do not count. A bound may be too low, not too high: where the device has several rates for
a type, the highest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from zreward.bundle import NARROW_TARGETS, Bundle, Work
from zreward.onnx_locations import external_locations
from zreward.runtime.bench.bound import Operations, stage_operations
from zreward.runtime.bench.machine import Machine, usable_cpus
from zreward.runtime.bench.rates import measure_rate
from zreward.runtime.bench.stages import PARTS, Tokens
from zreward.runtime.conformance.gpu import GpuFacts, copied_bytes_per_second

PRODUCTS = ("int8", "bits16", "tf32", "float32")
"""Kinds of products: `bits16` is float16 and bfloat16, `tf32` what plugins multiply DeltaNet states in."""

_COPIED_BYTES, _ROUNDS = 64 << 20, 5

# Operations of a multiprocessor in a clock, a multiplication and an addition being two; without sparsity, and by the
# faster kind of accumulation. From NVIDIA's papers on the architectures: A100, GA102, Ada, H100, B200, RTX Blackwell.
_PER_CLOCK: Mapping[str, tuple[int, int, int, int]] = {
    "8.0": (4096, 2048, 1024, 128),
    "8.6": (2048, 1024, 256, 256),
    "8.9": (2048, 1024, 256, 256),
    "9.0": (8192, 4096, 2048, 256),
    "10.0": (16384, 8192, 4096, 256),
    "12.0": (2048, 1024, 256, 256),
}


@dataclass(frozen=True)
class Limit:
    """How much of something the device does in a second, and how that is known."""

    per_second: float
    source: str


@dataclass(frozen=True)
class DeviceLimits:
    """What bounds are computed with.

    Attributes:
        device: its name.
        products: operations, by the kinds of `PRODUCTS`; a kind that is not known is missing.
        bandwidth: bytes of its memory; None where it is not known.
        copied: bytes that a copy was seen to move, read and written; for a GPU, whose `bandwidth` is what it reports.
        cache_bytes: of its last cache; None where it is not known.
    """

    device: str
    products: Mapping[str, Limit]
    bandwidth: Limit | None
    copied: Limit | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Bound:
    """The least that a stage takes.

    Attributes:
        operations: multiplications and additions; None where the bundle does not count them.
        n_bytes: of weights and states.
        products_ms: time of the operations; None where they or the rate of their kind are not known.
        memory_ms: time of the bytes; None where the bandwidth is not known, or the bytes fit into the cache.
        bound_ms: the larger of them.
    """

    operations: int | None
    n_bytes: int
    products_ms: float | None
    memory_ms: float | None
    bound_ms: float | None


def limits_of_gpu(facts: GpuFacts, device: int) -> DeviceLimits:
    """Of a GPU: what it reports, times the operations a clock that NVIDIA documents.

    Raises:
        BackendError: it cannot copy.
    """
    products = {}
    if facts.compute_capability in _PER_CLOCK and facts.clock_khz > 0:
        clocks = facts.multiprocessors * facts.clock_khz * 1e3
        for kind, operations in zip(PRODUCTS, _PER_CLOCK[facts.compute_capability], strict=True):
            source = (
                f"reported: {facts.multiprocessors} multiprocessors at {facts.clock_khz / 1e6:.2f} GHz; documented for "
                f"compute capability {facts.compute_capability}: {operations:,} operations a clock"
            )
            products[kind] = Limit(clocks * operations, source)
    reported = 2 * facts.memory_clock_khz * 1e3 * facts.memory_bus_bits / 8
    source = f"reported: {facts.memory_bus_bits} bits at 2 × {facts.memory_clock_khz / 1e6:.2f} GHz"
    copied = Limit(copied_bytes_per_second(device), "measured: copies within the GPU's memory")
    bandwidth = Limit(reported, source) if reported else copied
    return DeviceLimits(facts.name, products, bandwidth, copied, facts.l2_cache_bytes or None)


def limits_of_cpu(machine: Machine, threads: int | None) -> DeviceLimits:
    """Of the processor: measured, on as many threads as are examined.

    Raises:
        BackendError: the product of numpy could not be run.
    """
    rate = measure_rate(threads)
    what = "instructions on registers" if rate.method == "registers" else "a product of numpy"
    source = f"measured: {what}, {rate.threads} thread{'s' * (rate.threads != 1)}"
    floats = Limit(1e9 * rate.float_gops, source)
    products = {"float32": floats, "tf32": floats, "bits16": floats}
    if rate.bfloat16_gops is not None:
        products["bits16"] = Limit(1e9 * rate.bfloat16_gops, source)
    if rate.integer_gops is not None:
        products["int8"] = Limit(1e9 * rate.integer_gops, source)
    copied = Limit(_host_bytes_per_second(rate.threads), f"measured: copies of {_COPIED_BYTES >> 20} MiB")
    return DeviceLimits(machine.processor, products, copied, None, _last_cache_bytes())


def stage_bounds(
    bundle: Bundle, tokens: Tokens, limits: DeviceLimits, *, on_gpu: bool
) -> Mapping[str, Bound]:
    """The bound of each stage that runs a graph, for one image.

    Args:
        bundle: that runs.
        tokens: of a repetition.
        limits: of the device.
        on_gpu: whether 16-bit graphs multiply in 16 bits; ONNX Runtime's CPU does in float32.
    """
    work, manifest = bundle.manifest.work, bundle.manifest
    narrow = on_gpu and manifest.weights != "fp32" and manifest.target in NARROW_TARGETS
    kind = "bits16" if narrow else "float32"
    counted = {} if work is None else stage_operations(work, tokens, 1)
    # The part of the floats that DeltaNet states take, which plugins multiply in another type.
    others = {} if work is None else stage_operations(_without_states(work), tokens, 1)
    n_bytes = _stage_bytes(bundle, tokens)
    bounds = {}
    for stage in PARTS:
        if stage not in n_bytes:
            continue
        operations = counted.get(stage)
        products_ms = None
        if operations is not None:
            products_ms = _products_ms(operations, others[stage], limits, kind)
        memory_ms = _memory_ms(n_bytes[stage], limits)
        known = [ms for ms in (products_ms, memory_ms) if ms is not None]
        total = None if operations is None else operations.total
        # Bytes alone bound nothing where the operations are not known: it might be far from a bound.
        bound_ms = max(known) if products_ms is not None else None
        bounds[stage] = Bound(total, n_bytes[stage], products_ms, memory_ms, bound_ms)
    return bounds


def _without_states(work: Work) -> Work:
    return dataclasses.replace(work, decoder=dataclasses.replace(work.decoder, recurrent_per_row=0))


def _products_ms(operations: Operations, others: Operations, limits: DeviceLimits, kind: str) -> float | None:
    parts = {
        "int8": operations.integer,
        "bits16": operations.bfloat16,
        "tf32": operations.float - others.float,
    }
    parts[kind] = parts.get(kind, 0) + others.float
    if any(n and name not in limits.products for name, n in parts.items()):
        return None
    return 1e3 * sum(n / limits.products[name].per_second for name, n in parts.items() if n)


def _memory_ms(n_bytes: int, limits: DeviceLimits) -> float | None:
    if limits.bandwidth is None or limits.cache_bytes is None or n_bytes <= limits.cache_bytes:
        return None
    return 1e3 * n_bytes / limits.bandwidth.per_second


def _stage_bytes(bundle: Bundle, tokens: Tokens) -> Mapping[str, int]:
    """Weights once, states as they are read and left."""
    manifest = bundle.manifest
    weights = {
        name: sum(manifest.files[file].bytes for file in {graph, *_weight_files(bundle.path, graph)})
        for name, graph in manifest.graphs.items()
    }

    def state(past: int) -> int:
        return sum(s.n_bytes(rows=1, past=past) for s in manifest.states)

    text, whole = tokens.system + tokens.prompt, tokens.system + tokens.prompt + tokens.image
    return {
        "vision": weights["vision"],
        "system_text": weights["decoder"] + state(tokens.system),
        "prompt": weights["decoder"] + state(tokens.system) + state(text),
        "image_prefix": weights["decoder"] + state(text) + state(whole),
        "questions": weights["decoder"] + state(whole),
    }


def _weight_files(folder: Path, graph: str) -> set[str]:
    return {(Path(graph).parent / name).as_posix() for name in external_locations(folder / graph)}


def _host_bytes_per_second(threads: int) -> float:
    """Bytes read and written by copies that no cache holds, the best of a few rounds."""
    n = max(1, min(threads, usable_cpus()))
    source = np.ones(_COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(source, n), np.array_split(target, n), strict=True))
    seconds = []
    with ThreadPoolExecutor(n) as pool:
        for _ in range(_ROUNDS):
            start = perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            seconds.append(perf_counter() - start)
    return 2 * _COPIED_BYTES / min(seconds)


def _last_cache_bytes() -> int | None:
    """Of the first processor, where the system tells: Linux."""
    largest = None
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = size.read_text().strip()
            n_bytes = int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
        largest = max(largest or 0, n_bytes)
    return largest
