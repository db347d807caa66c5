"""Execution contexts of an engine: sizes, addresses, and a run.

All contexts of a device share one piece of scratch memory, since they run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from zreward.errors import BackendError
from zreward.runtime.backends.tensorrt.device import Device
from zreward.runtime.backends.tensorrt.memory import Shape
from zreward.tensorrt_library import quoted

Types = Mapping[str, "np.dtype[Any]"]


@dataclass
class LoadedEngine:
    """An engine in a GPU's memory.

    Attributes:
        trt: the library's module.
        engine: the library's object; None once it was given back.
        name: of its graph, for messages.
        inputs: type of each input, by name.
        outputs: likewise.
        said: the library's errors, as they come; whoever starts something empties it first.
    """

    trt: ModuleType
    engine: Any
    name: str
    inputs: Types
    outputs: Types
    said: MutableSequence[str]

    def error(self, what: str) -> BackendError:
        """What failed, with the library's own words."""
        return BackendError(f"TensorRT {self.trt.__version__} {what} (graph {self.name}){quoted(self.said)}")

    @property
    def captures_itself(self) -> bool:
        """Whether its contexts capture CUDA graphs: those of TensorRT-RTX do, which exchanges kernels as it runs."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def new_context(self) -> Any:
        """An execution context without scratch memory of its own."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.captures_itself:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None:
            raise self.error("has no memory for an execution context, or cannot make one")
        return context


@dataclass(frozen=True)
class Scratch:
    """Memory of a GPU for what an engine computes on the way."""

    address: int
    n_bytes: int


class Context:
    """One execution context of a profile; call it with the device in use.

    Raises:
        BackendError: the library cannot make it.
    """

    def __init__(self, engine: LoadedEngine, profile: int, scratch: Scratch, device: Device) -> None:
        self._engine, self._device = engine, device
        self._context: Any = engine.new_context()
        self._context.set_device_memory(scratch.address, scratch.n_bytes)
        if not self._context.set_optimization_profile_async(profile, device.stream):
            raise engine.error(f"refuses profile {profile}")
        device.synchronize()
        self._shapes: dict[str, Shape] = {}

    def output_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of all outputs for inputs of these.

        Raises:
            BackendError: the library refuses them.
        """
        self._set_shapes(shapes)
        found = {name: tuple(self._context.get_tensor_shape(name)) for name in self._engine.outputs}
        unknown = [name for name, shape in found.items() if any(size < 0 for size in shape)]
        if unknown:
            raise self._engine.error(f"does not know the shape of {', '.join(unknown)} before it runs")
        return found

    def enqueue(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Enqueue a run.

        Args:
            shapes: of all inputs.
            addresses: of all inputs and outputs.

        Raises:
            BackendError: the library refuses it.
        """
        self._set_shapes(shapes)
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.error(f"refuses the address of {name}")
        if not self._context.execute_async_v3(self._device.stream):
            raise self._engine.error("cannot run the engine")

    def close(self) -> None:
        """Give the library's object back."""
        self._context = None

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._shapes.pop(name, None)
                if not self._context.set_input_shape(name, shape):
                    raise self._engine.error(f"refuses {name} of {list(shape)}")
                self._shapes[name] = shape
