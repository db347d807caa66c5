"""CUDA's run-time compiler, by ctypes: device code to PTX without a toolkit or a C++ compiler, and without a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from zreward.errors import PluginError

# What the kernels use of the standard library; NVRTC has no headers of its own for it.
_STANDARD = {
    "cstdint": "#pragma once\n#include <stdint.h>\n",
    "cstddef": "#pragma once\n#include <stddef.h>\n",
    "stddef.h": "#pragma once\nusing size_t = decltype(sizeof(0));\n",
    "stdint.h": """#pragma once
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
""",
    "type_traits": """#pragma once
namespace std {
template <typename A, typename B>
inline constexpr bool is_same_v = false;
template <typename A>
inline constexpr bool is_same_v<A, A> = true;
}
""",
}


def ptx_from_cuda(
    source: Path, *, architecture: int, definitions: Mapping[str, str], headers: Sequence[Path]
) -> bytes:
    """PTX of the kernels in `source`, which are `extern "C"`.

    Args:
        architecture: compute capability times ten of the oldest GPU that shall run it.
        definitions: macros.
        headers: files that it may include by their names.

    Raises:
        PluginError: NVRTC is not installed, or refuses the source; the message ends with its log.
    """
    library = _library()
    files = {**_STANDARD, **{path.name: path.read_text(encoding="utf-8") for path in headers}}
    names = (ctypes.c_char_p * len(files))(*(name.encode() for name in files))
    texts = (ctypes.c_char_p * len(files))(*(text.encode() for text in files.values()))
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), source.name.encode(), len(files), texts, names
        ),
        "nvrtcCreateProgram",
    )
    try:
        options = [
            "--std=c++17",
            "--device-as-default-execution-space",
            f"--gpu-architecture=compute_{architecture}",
        ]
        options += [f"--define-macro={name}={value}" for name, value in definitions.items()]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise PluginError(
                f"{source}: NVRTC refuses this source:\n{_text(program, 'ProgramLog').decode()}"
            )
        return _text(program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    """What nvrtcGet… gives, without the zero at its end."""
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, text), f"nvrtcGet{what}")
    return text.value


def _check(status: int, function: str) -> None:
    if status:
        explain = _library().nvrtcGetErrorString
        explain.restype = ctypes.c_char_p
        raise PluginError(f"{function} failed: {explain(status).decode()}")


@cache
def _library() -> ctypes.CDLL:
    for candidate in _candidates():
        try:
            # NVRTC opens this one by its name alone, which finds it only where it is open already.
            for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise PluginError(
        "NVRTC, CUDA's run-time compiler, was not found; install it with `pip install nvidia-cuda-nvrtc`"
    )


def _candidates() -> Iterator[str]:
    """Those of pip's wheels, of CUDA 13 and 12, then those of the system."""
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
        yield from map(str, sorted(path for path in site.glob(pattern) if ".alt." not in path.name))
    named = ctypes.util.find_library("nvrtc")
    if named:
        yield named
    yield "/usr/local/cuda/lib64/libnvrtc.so"
