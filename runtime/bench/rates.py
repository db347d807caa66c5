"""The rate of products that this machine reaches at most, measured: what bounds are computed with.

With the compiled kernels it is that of their instructions on registers alone, on as many threads as are measured
(runtime/kernels/peak.cpp): of 8-bit whole numbers, of float32, and of bfloat16 where the processor has it. Without them
it is that of a large float32 product of numpy, and nothing is known of whole numbers.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from zreward.errors import BackendError, BenchError
from zreward.runtime.bench.machine import usable_cpus
from zreward.runtime.kernels import compiled_library

_ROUNDS, _SECONDS = 12, 0.05  # short, because the best one counts on a machine that does other things too
_SIZE = 1536  # of the product: 7.2 G operations, which no cache holds and a second does
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_PRODUCT = f"""
import time
import numpy as np
a, b = (np.random.default_rng(seed).random(({_SIZE}, {_SIZE}), dtype=np.float32) for seed in (0, 1))
c, seconds = a @ b, []
for _ in range({_ROUNDS}):
    start = time.perf_counter()
    np.matmul(a, b, out=c)
    seconds.append(time.perf_counter() - start)
print(min(seconds))
"""


@dataclass(frozen=True)
class Rate:
    """Operations a second, in thousand millions; a multiplication and an addition are two operations.

    Attributes:
        threads: that ran at once.
        integer_gops: of 8-bit whole numbers; None where it could not be measured.
        float_gops: of float32.
        bfloat16_gops: of bfloat16; None where the processor multiplies none, or it could not be measured.
        method: "registers" or "numpy".
    """

    threads: int
    integer_gops: float | None
    float_gops: float
    bfloat16_gops: float | None
    method: str

    def __post_init__(self) -> None:
        rates = [self.integer_gops, self.float_gops, self.bfloat16_gops]
        if any(rate is not None and not rate > 0 for rate in rates):
            raise BenchError(f"the machine's rate must be positive, not one of {rates}")


def kernels_run() -> bool:
    """Whether the compiled kernels are there, and this processor runs them."""
    integer = _peak_function("zreward_peak_integer")
    return integer is not None and integer(0.0) > 0


def measure_rate(threads: int | None) -> Rate:
    """The rate of `threads` threads, but of no more than there are cores; None is all cores.

    Raises:
        BackendError: the product of numpy could not be run.
    """
    cores = usable_cpus()
    n_threads = cores if threads is None else min(threads, cores)
    if not kernels_run():
        return Rate(n_threads, None, _numpy_rate(n_threads), None, "numpy")
    peaks = [_peak_function(f"zreward_peak_{kind}") for kind in ("integer", "float", "bfloat16")]
    integer, floats, bfloat16 = (peak and _rate_of_threads(peak, n_threads) for peak in peaks)
    if not floats:
        raise BackendError("the library of kernels is not whole; install zreward again")
    return Rate(n_threads, integer, floats, bfloat16 or None, "registers")


def _peak_function(name: str) -> Callable[[float], float] | None:
    """A function of the library: multiply-adds a second of the calling thread."""
    library = compiled_library()
    if library is None:
        return None
    try:
        function = getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError):  # of another version, or of another machine
        return None
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    call: Callable[[float], float] = function
    return call


def _rate_of_threads(peak: Callable[[float], float], n_threads: int) -> float:
    """The best of a few rounds, so that a moment of other work does not lower the bound."""
    return max(_round(peak, n_threads) for _ in range(_ROUNDS))


def _round(peak: Callable[[float], float], n_threads: int) -> float:
    rates: list[float] = []
    barrier = threading.Barrier(n_threads)

    def work() -> None:
        barrier.wait()
        rates.append(peak(_SECONDS))  # ctypes lets the other threads run meanwhile

    workers = [threading.Thread(target=work, daemon=True) for _ in range(n_threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 2e-9 * sum(rates)


def _numpy_rate(n_threads: int) -> float:
    """In a process of its own, because numpy's threads are chosen when it is loaded."""
    environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(n_threads))}
    result = subprocess.run([sys.executable, "-c", _PRODUCT], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise BackendError(f"a product of numpy failed:\n{result.stderr.strip()}")
    return 2e-9 * _SIZE**3 / float(result.stdout)
