"""Many scores of varied sizes in one process: memory stays flat, and threads get what one thread gets.

    python benchmarks/soak.py build/demo-bundle

A pool of prompts and pictures of different sizes is scored once, one item at a time. Then `--workers` threads score
items of the pool in random order through one `Scorer` until `--scores` are done, and every result must equal the first
one bit for bit. Resident memory is read as the scores go by; the last quarter may not be above the second one by more
than `--growth`. Exit status 1 if it is, or if a result differs. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zreward.runtime import Score, Scorer

PROMPTS = (
    "a single red ball on the floor",
    "two blue cubes",
    "a green cone left of a yellow cylinder",
    "a photo of a purple cube behind an orange ball",
    "one small white cylinder next to a large black cone, seen from above",
    "a cyan ball",
)
SIDES = (24, 47, 64, 96, 120, 131, 180, 256)
READINGS = 40

Item = tuple[str, Image.Image]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--scores", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=4, help="threads that score at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run of a graph")
    parser.add_argument("--growth", type=float, default=0.02, help="allowed, as a share")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pool = make_pool(arguments.seed)
    with Scorer.open(arguments.bundle, threads=arguments.threads) as scorer:
        expected = [probabilities(scorer.score(prompt=prompt, images=[image])[0]) for prompt, image in pool]
        start = time.perf_counter()
        memory, different = soak(scorer, pool, expected, arguments.scores, arguments.workers, arguments.seed)
        seconds = time.perf_counter() - start
    quarter = len(memory) // 4
    second, last = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    print(
        f"{arguments.scores:,} scores of {len(pool)} items by {arguments.workers} threads in {seconds:.0f} s, "
        f"{different} of them different"
    )
    print(f"resident memory, MB: {', '.join(f'{m / 1e6:.0f}' for m in memory[:: max(1, len(memory) // 10)])}")
    print(
        f"median of the second quarter {second / 1e6:.1f} MB, of the last {last / 1e6:.1f} MB: {last / second - 1:+.1%}"
    )
    return 1 if different or last > (1 + arguments.growth) * second else 0


def make_pool(seed: int) -> list[Item]:
    """Each prompt with pictures of several sizes, wide and high ones among them."""
    rng = np.random.default_rng(seed)
    items = []
    for index, prompt in enumerate(PROMPTS):
        for side in SIDES:
            width = SIDES[(SIDES.index(side) + index) % len(SIDES)]
            pixels = rng.integers(0, 256, (side, width, 3), dtype=np.uint8)
            items.append((prompt, Image.fromarray(pixels)))
    return items


def soak(
    scorer: Scorer,
    pool: list[Item],
    expected: list[NDArray[np.float64]],
    n_scores: int,
    workers: int,
    seed: int,
) -> tuple[list[int], int]:
    """Resident bytes as the scores went by, and how many of them differ from `expected`."""
    order = random.Random(seed).choices(range(len(pool)), k=n_scores)
    memory: list[int] = []
    done, lock = 0, threading.Lock()

    def one(index: int) -> bool:
        nonlocal done
        prompt, image = pool[index]
        found = probabilities(scorer.score(prompt=prompt, images=[image])[0])
        with lock:
            done += 1
            if done % max(1, n_scores // READINGS) == 0:
                memory.append(resident_bytes())
                print(f"\r{done:,} of {n_scores:,}", end="", file=sys.stderr)
        return not np.array_equal(found, expected[index])

    with ThreadPoolExecutor(workers) as threads:
        different = sum(threads.map(one, order))
    print(file=sys.stderr)
    return memory, different


def probabilities(score: Score) -> NDArray[np.float64]:
    return np.array([score[name].probs for name in score])


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
