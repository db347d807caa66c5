"""What it takes to build the plugins, and where it is looked for: nvcc, CMake, a C++ compiler, TensorRT's headers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zreward.errors import PluginError

LEAST_CUDA = (12, 8)
"""The first nvcc that knows compute capability 12.0."""

HEADER = "NvInferRuntime.h"

_HEADER_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)

_USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")

_VERSION_TIMEOUT_S = 120


@dataclass(frozen=True)
class Toolchain:
    """Paths of the tools; `cuda` is nvcc's version, such as "13.0.88". `tensorrt_include` is None for kernels alone."""

    nvcc: Path
    cuda: str
    cmake: Path
    tensorrt_include: Path | None


def find_toolchain(
    *,
    nvcc: Path | None = None,
    tensorrt: Path | None = None,
    kernels_only: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Toolchain:
    """Find every tool, in the order of docs/plugins.md.

    Args:
        nvcc: the compiler, where it is not to be looked for.
        tensorrt: TensorRT's folder or that of its headers, where it is not to be looked for.
        kernels_only: leaves the headers out.

    Raises:
        PluginError: one is missing or too old; the message says where it was looked for and how to get it.
    """
    found_nvcc = find_nvcc(nvcc, environment)
    version = nvcc_version(found_nvcc)
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_CUDA:
        least = ".".join(map(str, LEAST_CUDA))
        raise PluginError(
            f"{found_nvcc}: nvcc {version} is too old for the architectures of the plugins; CUDA {least} or "
            "later is needed"
        )
    cmake = _which("cmake", environment)
    if cmake is None:
        raise PluginError("CMake was not found on PATH; install it, for example with `pip install cmake`")
    if _which("c++", environment) is None and "CXX" not in environment:
        raise PluginError(
            "no C++ compiler was found (c++ on PATH, or CXX); install one, for example with `apt-get install g++`. "
            'The score head alone needs none: see "without a C++ compiler" in docs/plugins.md'
        )
    include = None if kernels_only else find_tensorrt_include(tensorrt, environment)
    return Toolchain(found_nvcc, version, cmake, include)


def find_nvcc(given: Path | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """The CUDA compiler: `given`, CUDACXX, CUDA_HOME, PATH, pip's wheels, /usr/local/cuda, the first that exists.

    Raises:
        PluginError: there is none, or `given` or CUDACXX names a file that does not exist.
    """
    for name, value in (("--nvcc", given), ("CUDACXX", environment.get("CUDACXX"))):
        if value:
            path = Path(value)
            if not path.is_file():
                raise PluginError(f"{path}: there is no nvcc here, which {name} names")
            return path
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    candidates: list[Path | None] = [Path(home) / "bin" / "nvcc" if home else None]
    candidates += [_which("nvcc", environment), wheel_nvcc(), _USUAL_NVCC]
    found = next((path for path in candidates if path is not None and path.is_file()), None)
    if found is None:
        raise PluginError(
            "nvcc was not found (--nvcc, CUDACXX, CUDA_HOME, PATH, pip's wheels, /usr/local/cuda); install a CUDA "
            "toolkit, or the compiler alone with `pip install 'zreward[plugins]'`"
        )
    return found


def wheel_nvcc() -> Path | None:
    """nvcc of the wheels `nvidia-cuda-nvcc` and those it needs, in this environment."""
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    return max(site.glob("cu*/bin/nvcc"), default=None)


def nvcc_version(nvcc: Path) -> str:
    """Its version, such as "13.0.88".

    Raises:
        PluginError: it does not run, or says no version.
    """
    try:
        answer = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise PluginError(f"{nvcc}: this nvcc does not run ({error})") from None
    match = re.search(r"\bV(\d+\.\d+(?:\.\d+)*)", answer)
    if match is None:
        raise PluginError(f"{nvcc}: `nvcc --version` names no version: {answer.strip()[:200]!r}")
    return match.group(1)


def find_tensorrt_include(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of TensorRT's headers: `given` or its include/, TENSORRT_ROOT, the folders of system packages.

    Raises:
        PluginError: there is none.
    """
    for name, value in (("--tensorrt", given), ("TENSORRT_ROOT", environment.get("TENSORRT_ROOT"))):
        if value:
            found = _header_folder([Path(value), Path(value) / "include"])
            if found is None:
                raise PluginError(
                    f"{value}: neither this folder, which {name} names, nor its include/ has {HEADER}"
                )
            return found
    found = _header_folder(map(Path, _HEADER_FOLDERS))
    if found is None:
        raise PluginError(
            f"TensorRT's C++ headers ({HEADER}) were not found (--tensorrt, TENSORRT_ROOT, "
            f"{', '.join(_HEADER_FOLDERS)}). "
            "Its pip packages have none: take them from TensorRT's Debian, tar or container release, or from the "
            "folder include/ of github.com/NVIDIA/TensorRT at the tag of your version, and name the folder with "
            "--tensorrt"
        )
    return found


def _header_folder(folders: Iterable[Path]) -> Path | None:
    return next((folder.resolve() for folder in folders if (folder / HEADER).is_file()), None)


def _which(name: str, environment: Mapping[str, str]) -> Path | None:
    """`name` on PATH, or beside this interpreter, where pip puts programs."""
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join(filter(None, [environment.get("PATH"), scripts]))
    found = shutil.which(name, path=path)
    return Path(found) if found else None
