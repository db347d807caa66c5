"""TensorRT and TensorRT-RTX: an engine that `zreward engine` built, run on a GPU without torch.

opening     which engine of a bundle runs here, checked by hash and loaded
session     one graph: inputs in, run, results out; states stay on the GPU
context     TensorRT's execution contexts
graphs      runs that come again, as captured CUDA graphs
memory      buffers and blocks of the GPU's memory
device      the CUDA driver
inspection  the layers of an engine, as TensorRT tells them
"""

from zreward.runtime.backends.tensorrt.device import Device
from zreward.runtime.backends.tensorrt.inspection import EngineLayer
from zreward.runtime.backends.tensorrt.memory import DeviceArray
from zreward.runtime.backends.tensorrt.opening import open_engine
from zreward.runtime.backends.tensorrt.session import EngineSession

__all__ = ["Device", "DeviceArray", "EngineLayer", "EngineSession", "open_engine"]
