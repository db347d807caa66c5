"""What providers are compared with: ONNX Runtime on the CPU, and the golden scores of the bundle.

The provider "cpu" is itself ONNX Runtime on the CPU. It is compared with the same graphs as they are written: no
optimizations, no packed weights, none of zreward's compiled kernels, one thread. Other code computes the same there,
operator by operator. Whole-number products are the exception on x86 without VNNI: ONNX Runtime sums them exactly only
with its optimizations, so those stay on (`zreward.runtime.backends.ort.sum_exactly`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from zreward.bundle import Bundle, GoldenItem
from zreward.errors import BackendError
from zreward.runtime.backends import OpenGraphs, Session
from zreward.runtime.backends.ort import OrtSession
from zreward.runtime.conformance.plan import ConformancePlan
from zreward.runtime.conformance.report import Reference
from zreward.runtime.conformance.stages import Array, Observed, Subject, golden_differences
from zreward.runtime.conformance.tolerances import arithmetic_of

OpenRounded = Callable[[Path, Callable[[Path], Session]], Session]
"""Opens a graph that computes in bfloat16, which ONNX Runtime's CPU does not, as one that rounds where it does."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the golden inputs should give.

    Attributes:
        observed: by stage; empty where there is no reference but the golden scores.
        probs: of each item [dimensions, bins]: of the reference, or the golden ones.
        record: for the report.
    """

    observed: tuple[Observed, ...]
    probs: Sequence[Array]
    record: Reference


def check_installed() -> None:
    """Make sure that there is something to compare with, before any work.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    if find_spec("onnxruntime") is None:
        raise BackendError(
            "onnxruntime is not installed, and providers are compared with it; install it with `pip install "
            "'zreward[cpu]'`"
        )


def expected_of(
    bundle: Bundle, plan: ConformancePlan, items: Sequence[GoldenItem], open_rounded: OpenRounded | None
) -> Expected:
    """Compute the golden inputs on the CPU.

    Raises:
        BackendError: ONNX Runtime is not installed or refuses the graphs.
    """
    plain = plan.provider == "cpu"
    threads = 1 if plain else plan.threads
    what = "ONNX Runtime on the CPU"
    if plain:
        what += (
            ", graphs as they are written: no packed weights, kernels of ours or optimizations, unless sums are "
            "exact only with them; one thread"
        )

    def opened(path: Path) -> Session:
        return OrtSession(path, threads=threads, plain=plain)

    open_graph: Callable[[Path], Session] = opened
    if arithmetic_of(bundle) == "bfloat16":
        if open_rounded is None:
            return _golden_alone(
                items, "graphs in bfloat16 run on a CPU only with `pip install 'zreward[export]'`"
            )
        rounds, what = open_rounded, f"{what}, in float32 that is rounded to bfloat16 where the graphs are"

        def open_graph(path: Path) -> Session:
            return rounds(path, opened)

    try:
        sessions = {name: open_graph(bundle.path / file) for name, file in bundle.manifest.graphs.items()}
    except OSError as error:  # the copy that rounds lies beside the graph for a moment
        return _golden_alone(items, f"the folder of the bundle cannot be written to ({error.strerror})")
    subject = Subject(bundle, OpenGraphs("cpu", what, sessions))
    with subject.scorer:
        observed = tuple(subject.observe(item) for item in items)
    probs = [one.probs for one in observed]
    difference = golden_differences(probs, items)
    return Expected(
        observed, probs, Reference(what, threads, difference if np.isfinite(difference) else None)
    )


def _golden_alone(items: Sequence[GoldenItem], why: str) -> Expected:
    probs = [np.array(list(item.probs.values())) for item in items]
    return Expected((), probs, Reference("the golden scores of the bundle", None, None, why))
