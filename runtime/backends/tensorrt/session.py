"""One graph of a bundle as an engine: what a backend's session is, with states that stay on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from zreward.engines import GraphEngine
from zreward.errors import BackendError
from zreward.runtime.backends import Tensor
from zreward.runtime.backends.tensorrt.context import Context, LoadedEngine, Scratch
from zreward.runtime.backends.tensorrt.device import Device
from zreward.runtime.backends.tensorrt.graphs import GraphFacts, Runner
from zreward.runtime.backends.tensorrt.inspection import EngineLayer, layers_of
from zreward.runtime.backends.tensorrt.memory import DeviceArray, Layout, Memory, Shape, n_bytes

_CAPTURES_ITSELF = "TensorRT-RTX captures its own"


class EngineSession:
    """An engine that runs; safe to call from several threads, which take turns.

    Args:
        engine: the loaded engine.
        record: what engine.json says of it.
        scratch: memory that it shares with the other engine.
        memory: likewise, for inputs and outputs.
        kept: outputs that stay on the GPU: `run` returns them as `DeviceArray`.
    """

    def __init__(
        self,
        engine: LoadedEngine,
        record: GraphEngine,
        scratch: Scratch,
        memory: Memory,
        kept: frozenset[str],
    ) -> None:
        self.inputs = frozenset(engine.inputs)
        self._engine, self._record, self._memory, self._kept = engine, record, memory, kept
        self._device: Device = memory.device
        off = _CAPTURES_ITSELF if engine.captures_itself else None
        with self._device.in_use():
            self._runners = [
                Runner(self._device, partial(Context, engine, index, scratch, self._device), off=off)
                for index in range(len(record.profiles))
            ]

    @property
    def graph_facts(self) -> Mapping[str, GraphFacts]:
        """What became of CUDA graphs, by the name of the profile."""
        return {
            profile.name: runner.facts
            for profile, runner in zip(self._record.profiles, self._runners, strict=False)
        }

    def layers(self) -> tuple[EngineLayer, ...]:
        """What the engine is made of.

        Raises:
            BackendError: TensorRT does not tell.
            UsageError: the engine is closed.
        """
        with self._device.in_use():
            return layers_of(self._engine)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> list[Any]:
        """The outputs asked for, in order: arrays of this device as they lie there, everything else as NumPy arrays.

        Raises:
            BackendError: an input is missing, unknown, or of another type; no profile takes the sizes; the GPU has no
                memory left; or the run failed.
            UsageError: the engine is closed.
        """
        shapes = self._checked_shapes(outputs, inputs)
        profile = self._record.profile_for(shapes)
        with self._device.in_use():
            self._engine.said.clear()
            runner = self._runners[profile]
            made = {
                name: (shape, self._engine.outputs[name])
                for name, shape in runner.output_shapes(shapes).items()
            }
            kept = self._kept_arrays({name: made[name] for name in outputs if name in self._kept})
            fetched = {name: made[name] for name in outputs if name not in self._kept}
            unread = Layout.of({name: n_bytes(*made[name]) for name in made if name not in {*kept, *fetched}})
            # All memory first: none is given back while work waits.
            addresses = {name: array.address for name, array in kept.items()}
            addresses |= self._memory.place_results(fetched)
            addresses |= unread.addresses(self._memory.unread.reserve(unread.total))
            addresses |= self._memory.place_inputs(inputs)
            runner.run(shapes, addresses)
            results: Mapping[str, Any] = {**kept, **self._memory.fetch(fetched)}
        return [results[name] for name in outputs]

    def close(self) -> None:
        """Give the contexts and the engine back; call it with the device in use."""
        for runner in self._runners:
            runner.close()
        self._engine.engine = None

    def _checked_shapes(self, outputs: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Shape]:
        name = self._engine.name
        unknown = sorted(set(inputs) - self.inputs) + sorted(set(outputs) - set(self._engine.outputs))
        if unknown:
            raise BackendError(f"graph {name}: the engine has no {', '.join(unknown)}; build it again")
        for key, array in inputs.items():
            expected = self._engine.inputs[key]
            if np.dtype(array.dtype) != expected:
                raise BackendError(f"graph {name}: input {key!r} is {expected}, not {array.dtype}")
        # In one order, whoever asks: shapes are a key.
        return {key: tuple(map(int, inputs[key].shape)) for key in self._record.inputs if key in inputs}

    def _kept_arrays(self, described: Mapping[str, tuple[Shape, np.dtype[Any]]]) -> dict[str, DeviceArray]:
        """Arrays in one block that nothing has written yet."""
        if not described:
            return {}
        layout = Layout.of({name: n_bytes(*entry) for name, entry in described.items()})
        block = self._memory.states.take(layout.total)
        return {
            name: DeviceArray(block.address + layout.offsets[name], shape, dtype, self._device, block)
            for name, (shape, dtype) in described.items()
        }
