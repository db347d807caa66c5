"""Run a command and print the peak resident memory of it and all its children together (Linux).

    python benchmarks/peak_memory.py zreward export build/random-0.8B -o build/bundle-0.8B --no-parity

`time -v` reports the largest single process. An export runs its lowering in a child, so what a machine must
have is the sum, sampled here every 50 ms. Mapped files count where they are resident.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

INTERVAL_SECONDS = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident_bytes, family(process.pid))))
        time.sleep(INTERVAL_SECONDS)
    seconds = time.perf_counter() - start
    print(f"peak resident memory {peak / 1e9:.2f} GB, {seconds:.0f} s", file=sys.stderr)
    return process.returncode


def family(pid: int) -> list[int]:
    """`pid` and all its descendants that still run."""
    try:
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [
        pid,
        *(descendant for text in lists for child in text.split() for descendant in family(int(child))),
    ]


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
