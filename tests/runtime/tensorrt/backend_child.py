"""Scenarios of the TensorRT backend, in a process whose loader finds a CUDA driver and TensorRT made of stubs.

python -m tests.runtime.tensorrt.backend_child FLAVOUR BUNDLE [SCENARIO…]

Each scenario is a function that asserts; the process prints which ones passed, and the trace of those that did not.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.runtime.tensorrt import conforming, failing, running
from tests.runtime.tensorrt.world import World
from tests.support.cuda_driver import FakeDriver
from zreward import plugins
from zreward.runtime.backends.tensorrt import graphs

SCENARIOS: tuple[Callable[[World], None], ...] = (
    running.scores_equal_those_of_the_cpu,
    running.golden_inputs_are_replayed,
    running.every_call_of_a_run,
    running.buffers_grow_and_are_used_again,
    running.states_stay_on_the_gpu,
    running.graphs_are_captured_replayed_and_bounded,
    running.threads_share_a_scorer,
    running.closing_gives_everything_back,
    running.an_engine_of_few_images_scores_many,
    running.a_benchmark_has_no_bound,
    failing.a_capture_that_fails_turns_graphs_off,
    failing.sizes_and_types_that_no_profile_takes,
    failing.calls_that_the_library_refuses,
    failing.a_gpu_without_memory,
    failing.a_run_that_fails_on_the_gpu,
    failing.engines_that_do_not_fit,
    failing.another_gpu_is_named,
    failing.plugins_are_hashed_before_they_are_loaded,
    failing.auto_takes_what_runs,
    conforming.conformance_with_and_without_plugins,
    conforming.conformance_of_a_flavour_without_plugins,
    conforming.conformance_finds_what_is_wrong,
    conforming.conformance_of_plugins_that_are_not_there,
    conforming.conformance_that_cannot_begin,
)
ALONE: Callable[[World], None] = failing.a_driver_that_lacks_a_function
"""In a process of its own."""


def main() -> None:
    """Print the outcome of each scenario: null, or the trace of its failure."""
    flavour, source, *named = sys.argv[1:]
    module = importlib.import_module("tensorrt" if flavour == "tensorrt" else "tensorrt_rtx_bindings")
    alone = [ALONE.__name__]
    driver, outcomes = FakeDriver(without=("cuMemAlloc",) if named == alone else ()), {}
    defaults = {(m, n): getattr(m, n) for m, n in ((graphs, "MOST_GRAPHS"), (plugins, "find_library"))}
    for scenario in (*SCENARIOS, ALONE):
        if scenario.__name__ not in (named or [scenario.__name__ for scenario in SCENARIOS]):
            continue
        for (owner, name), value in defaults.items():
            setattr(owner, name, value)
        driver.reset()
        with TemporaryDirectory() as temporary:
            try:
                scenario(World(flavour, module, driver, Path(source), Path(temporary)))
                outcomes[scenario.__name__] = None
            except Exception:
                outcomes[scenario.__name__] = "\n".join([traceback.format_exc(), *driver.violations])
        gc.collect()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
