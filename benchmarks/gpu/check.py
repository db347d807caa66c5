"""Random calls of the kernels against float64, on a GPU or an emulated one.

    python -m benchmarks.gpu.check build/gpu/libzreward_kernels.so --count 200 --json cases.json

Prints the largest relative error of each operator and type, and every call that went beyond its limit (float32 1e-4,
16 bits 1e-2), which makes the exit status 1. The JSON has the sizes and errors of all calls.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from benchmarks.gpu.cases import LIMITS, OPERATORS, Outcome, run_cases
from benchmarks.gpu.library import Kernels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--count", type=int, default=200, help="calls of each operator, the types in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", help="cpu for a library on the emulator of tests/plugins")
    parser.add_argument(
        "--most-work", type=float, default=math.inf, help="bounds a call: see cases.run_cases"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kernels, device = Kernels(arguments.library), torch.device(arguments.device)
    outcomes: list[Outcome] = []
    for operator in OPERATORS:
        found = run_cases(kernels, operator, arguments.count, device, arguments.seed, arguments.most_work)
        outcomes += found
        for dtype, limit in LIMITS.items():
            worst = max((outcome.worst for outcome in found if outcome.dtype == dtype), default=math.nan)
            name = str(dtype).removeprefix("torch.")
            print(f"{operator:<18} {name:<9} worst relative error {worst:.2e}, limit {limit:.0e}")
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        print(f"FAILED {outcome}")
    if arguments.json:
        arguments.json.write_text(json.dumps([_as_json(outcome) for outcome in outcomes], indent=1) + "\n")
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} calls within their limits")
    return 1 if failed or not outcomes else 0


def _as_json(outcome: Outcome) -> dict[str, object]:
    # JSON has no infinity, which stands for numbers that are not finite and for guards that were overwritten
    errors = {name: error if math.isfinite(error) else None for name, error in outcome.errors.items()}
    return {
        "operator": outcome.operator,
        "type": str(outcome.dtype).removeprefix("torch."),
        "passed": outcome.passed,
        "errors": errors,
        "sizes": outcome.sizes,
    }


if __name__ == "__main__":
    sys.exit(main())
