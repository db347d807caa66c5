"""The score head as a Python plugin of TensorRT, for people without a C++ compiler.

TensorRT's "quick" plugins take PTX and launch it by themselves, ahead of time: an engine with this head holds the
code, and runs where neither Python nor zreward is. They launch one kernel, and hand over tensors and 32-bit integers
alone; so the norm's epsilon and the type of the hidden states are compiled in, by NVRTC. CausalConv1d and
GatedDeltaRule run their bodies then.

TensorRT 10.16 and 11 have `tensorrt.plugin`; TensorRT-RTX does not. In 11.1 and 11.2 every new shape loads the kernel
again and keeps the earlier one (NVIDIA/TensorRT issue 4849): use an optimization profile of few shapes there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zreward.errors import PluginError
from zreward.export.plugins.nvrtc import ptx_from_cuda
from zreward.plugins import NAMESPACE

OPERATOR = f"{NAMESPACE}::RubricExpectation"
KERNEL = "zreward_quick_head"

OLDEST = 80
"""Compute capability, times ten, that the PTX is made for; later GPUs compile it when the engine is loaded."""

_KERNELS = Path(__file__).resolve().parent / "kernels"
_HEADERS = ("rubric_expectation.h", "device.h", "zreward_kernels.h")
_THREADS = 512  # of rubric_expectation.h
_MOST_BINS = 32

_INPUTS = ("hidden", "norm_weight", "score_rows", "temperature", "bins")


def quick_head_ptx(hidden_type: int, epsilon: float) -> bytes:
    """PTX of the kernel `KERNEL`.

    Args:
        hidden_type: 0 for float32, 1 for float16, 2 for bfloat16.
        epsilon: of the norm, at least 0.

    Raises:
        PluginError: a value that the kernel does not take, or NVRTC is missing.
    """
    if hidden_type not in (0, 1, 2) or not 0 <= epsilon <= 1:
        raise PluginError(f"RubricExpectation: type {hidden_type} or epsilon {epsilon} is not taken")
    return ptx_from_cuda(
        _KERNELS / "quick_head.cu",
        architecture=OLDEST,
        definitions={
            "ZREWARD_HIDDEN_TYPE": str(hidden_type),
            "ZREWARD_EPSILON": f"{float(np.float32(epsilon)).hex()}f",
        },
        headers=[_KERNELS / name for name in _HEADERS],
    )


def register_quick_head(tensorrt: Any) -> None:
    """Register the plugin with a `tensorrt` module, whose parser then takes it for nodes of that name.

    To be called before a network is parsed, and instead of loading the plugin library, which has a creator of the same
    name.

    Raises:
        PluginError: this TensorRT has no Python plugins.
    """
    try:
        import importlib

        plugin = importlib.import_module(f"{tensorrt.__name__}.plugin")
    except ImportError:
        raise PluginError(
            f"{tensorrt.__name__} {tensorrt.__version__} has no Python plugins (tensorrt.plugin); build "
            "the plugin library with `zreward plugins build`, or go without plugins"
        ) from None
    types = {tensorrt.float32: 0, tensorrt.float16: 1, tensorrt.bfloat16: 2}

    def describe(
        hidden: Any, norm_weight: Any, score_rows: Any, temperature: Any, bins: Any, epsilon: Any
    ) -> Any:
        rows, n_bins = hidden.shape_expr[0], score_rows.shape_expr[0]
        shapes = (rows, n_bins), (rows,), (rows,)
        return tuple(plugin.from_shape_expr(shape, tensorrt.float32) for shape in shapes)

    def implement(
        hidden: Any,
        norm_weight: Any,
        score_rows: Any,
        temperature: Any,
        bins: Any,
        epsilon: Any,
        outputs: Any,
        tactic: Any,
    ) -> Any:
        if hidden.dtype not in types:
            raise PluginError(
                f"RubricExpectation: hidden is {hidden.dtype}; it must be float32, float16 or bfloat16"
            )
        launch = plugin.KernelLaunchParams()
        launch.grid_x = hidden.shape_expr[0]
        launch.block_x = _THREADS
        launch.shared_mem = 4 * _MOST_BINS
        integers = plugin.SymIntExprs(2)
        integers[0] = plugin.SymInt32(hidden.shape_expr[1])
        integers[1] = plugin.SymInt32(score_rows.shape_expr[0])
        ptx = quick_head_ptx(types[hidden.dtype], float(np.asarray(epsilon).reshape(-1)[0]))
        return KERNEL, ptx, launch, integers

    # TensorRT reads its types off these functions. An array of float32 is what the parser makes of the attribute.
    described = dict.fromkeys(_INPUTS, plugin.TensorDesc) | {"epsilon": npt.NDArray[np.float32]}
    outputs = tuple[plugin.TensorDesc, plugin.TensorDesc, plugin.TensorDesc]  # type: ignore[name-defined]
    describe.__annotations__ = described | {"return": outputs}
    kernel = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]  # type: ignore[name-defined]
    implement.__annotations__ = described | {"outputs": outputs, "tactic": int, "return": kernel}
    plugin.register(OPERATOR)(describe)
    plugin.aot_impl(OPERATOR)(implement)
