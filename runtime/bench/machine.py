"""What a measurement was taken on and with: processor, memory, graphics processors, system, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zreward import __version__

_PACKAGES = (
    *("numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu"),
    *("cuda-bindings", "tensorrt", "tensorrt_rtx_cu13_libs"),
)

# What decides how fast products are: vector widths, whole-number and matrix instructions of x86 and Arm.
_FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme"),
)


@dataclass(frozen=True)
class Gpu:
    """A graphics processor, as nvidia-smi names it."""

    name: str
    driver: str
    memory: str


@dataclass(frozen=True)
class Machine:
    """As far as the system tells.

    Attributes:
        processor: its name.
        architecture: of the instruction set.
        flags: of the processor, those that decide how fast products are.
        system: name and version of the system and its kernel.
        cpu_count: logical processors of the machine.
        usable_cpus: those that this process may run on.
        cpu_limit: processors' worth of time that a container grants, None without a limit.
        memory_bytes: of the machine.
        gpus: none where nvidia-smi is not found.
        load_average: of 1, 5 and 15 minutes, before the work. Above the number of processors, the figures are those
            of a busy machine.
    """

    processor: str
    architecture: str
    flags: tuple[str, ...]
    system: str
    cpu_count: int | None
    usable_cpus: int
    cpu_limit: float | None
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]
    load_average: tuple[float, ...] | None


def describe_machine() -> Machine:
    """This machine, now."""
    cpu = _cpuinfo()
    return Machine(
        processor=cpu.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        flags=_known_flags(cpu.get("flags") or cpu.get("features") or ""),
        system=_system(),
        cpu_count=os.cpu_count(),
        usable_cpus=usable_cpus(),
        cpu_limit=_cpu_limit(),
        memory_bytes=_memory_bytes(),
        gpus=_gpus(),
        load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
    )


def usable_cpus() -> int:
    """Logical processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def versions() -> Mapping[str, str]:
    """Of Python and of the packages that the runtime uses."""
    found = {"zreward": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def restart_peak_memory() -> bool:
    """Let `peak_memory_bytes` begin anew, where the system can: on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """The most memory of this process that was resident since `restart_peak_memory`, or since it began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def resident_bytes() -> int | None:
    """Memory of this process that is resident now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo, keys in lower case; nothing on other systems than Linux."""
    entries: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            entries.setdefault(key.strip().lower(), value.strip())
    return entries


def _known_flags(found: str) -> tuple[str, ...]:
    flags = set(found.lower().split())
    return tuple(flag for flag in _FLAGS if flag in flags)


def _system() -> str:
    name = f"{platform.system()} {platform.release()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    except (OSError, KeyError):
        return name


def _cpu_limit() -> float | None:
    """Of the second version of control groups, where a container has one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # none, or "max"
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> tuple[Gpu, ...]:
    query = "--query-gpu=name,driver_version,memory.total"
    try:
        listed = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.stdout.splitlines()]
    return tuple(Gpu(*row) for row in rows if len(row) == 3)
