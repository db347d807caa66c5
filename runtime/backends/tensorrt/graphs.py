"""Runs of one profile, repeated ones as captured CUDA graphs.

Launching the kernels of a decoder one by one can take longer than they run. A graph launches them together, for one
set of shapes and addresses. Shapes follow from images and prompts, so most come once: a run is captured when the same
one was seen before, and the graphs that were used least recently make room.

A graph remembers its context as it was captured, so each has a context of its own (NVIDIA's advice); the others share
one. Graphs are found by their addresses too: where a buffer grew or a state lies elsewhere, there is another one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zreward.errors import BackendError
from zreward.runtime.backends.tensorrt.context import Context
from zreward.runtime.backends.tensorrt.device import Device, DeviceError
from zreward.runtime.backends.tensorrt.memory import Shape

_log = logging.getLogger(__name__)

MOST_GRAPHS = 8
"""Of a profile: an image of every common size, or a few prompts with their questions."""

RUNS_BEFORE_CAPTURE = 2
"""Equal runs before the one that is captured: a capture costs about a run, and what came twice may come often."""

_MOST_SEEN = 256

_Run = tuple[tuple[tuple[str, Shape], ...], tuple[tuple[str, int], ...]]


@dataclass
class _Captured:
    context: Context
    executable: Any


@dataclass
class GraphFacts:
    """What became of the captures of a profile.

    Attributes:
        captured: graphs that were made,
        replayed: and how many runs they were.
        off: why none is made any more; None where they are.
    """

    captured: int = 0
    replayed: int = 0
    off: str | None = None


class Runner:
    """Runs one profile of an engine; call it with the device in use.

    Args:
        device: that it runs on.
        new_context: makes a context of the profile.
        off: why nothing is to be captured, if so.
    """

    def __init__(self, device: Device, new_context: Callable[[], Context], *, off: str | None = None) -> None:
        self._device, self._new_context = device, new_context
        self._context = new_context()
        self._captured: OrderedDict[_Run, _Captured] = OrderedDict()
        self._seen: OrderedDict[_Run, int] = OrderedDict()
        self._output_shapes: OrderedDict[tuple[tuple[str, Shape], ...], dict[str, Shape]] = OrderedDict()
        self.facts = GraphFacts(off=off)

    def output_shapes(self, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
        """See `Context.output_shapes`."""
        key = tuple(shapes.items())
        if key not in self._output_shapes:
            self._output_shapes[key] = self._context.output_shapes(shapes)
            _shorten(self._output_shapes, _MOST_SEEN)
        return self._output_shapes[key]

    def run(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Enqueue a run; see `Context.enqueue`."""
        run: _Run = tuple(shapes.items()), tuple(sorted(addresses.items()))
        captured = self._captured.get(run)
        if captured is not None:
            self._captured.move_to_end(run)
            self._device.launch(captured.executable)
            self.facts.replayed += 1
        elif self.facts.off is None and self._times_seen(run) >= RUNS_BEFORE_CAPTURE:
            self._run_and_capture(run, shapes, addresses)
        else:
            self._context.enqueue(shapes, addresses)

    def close(self) -> None:
        """Give the contexts and graphs back."""
        for captured in self._captured.values():
            self._device.forget(captured.executable)
        for context in (self._context, *(captured.context for captured in self._captured.values())):
            context.close()
        self._captured.clear()

    def _run_and_capture(self, run: _Run, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        try:
            context = self._spare_context()
        except BackendError as error:
            self._stop_capturing(error)
            self._context.enqueue(shapes, addresses)
            return
        context.enqueue(shapes, addresses)  # the run itself, which brings the context up to date as well
        try:
            executable = self._device.capture(lambda: context.enqueue(shapes, addresses))
        except BackendError as error:
            self._stop_capturing(error)
            return
        self._captured[run] = _Captured(context, executable)
        self._seen.pop(run, None)
        self.facts.captured += 1

    def _times_seen(self, run: _Run) -> int:
        """How often this run was asked about before."""
        times = self._seen.pop(run, 0)
        self._seen[run] = times + 1
        _shorten(self._seen, _MOST_SEEN)
        return times

    def _spare_context(self) -> Context:
        if len(self._captured) < MOST_GRAPHS:
            return self._new_context()
        _, oldest = self._captured.popitem(last=False)
        self._device.synchronize()  # it may still run
        self._device.forget(oldest.executable)
        return oldest.context

    def _stop_capturing(self, error: BackendError) -> None:
        self.facts.off = error.reason if isinstance(error, DeviceError) else str(error)
        _log.warning("no more CUDA graphs are captured, so runs may take longer to start: %s", self.facts.off)


def _shorten(entries: OrderedDict[Any, Any], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
