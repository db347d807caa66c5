"""Jobs that need one another, several at a time.

Models of this size are too small for many threads: two processes with one thread each do more than one with two.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """A call that other jobs may have to wait for.

    Attributes:
        name: by which they know it.
        call, arguments: what can be sent to another process.
        needs: names of jobs that end first; names that no job has are taken for done.
    """

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    needs: frozenset[str] = frozenset()

    def after(self, names: Iterable[str]) -> Job:
        return replace(self, needs=self.needs | frozenset(names))


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Run all, at most `workers` at a time, earlier ones of the list first where there is a choice.

    Raises:
        Exception: of the first job that fails, after those under way have ended; no other is begun.
    """
    waiting = list(jobs)
    pending = {job.name for job in jobs}
    running: dict[Future[None], str] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            ready = [job for job in waiting if not job.needs & pending][: workers - len(running)]
            for job in ready:
                waiting.remove(job)
                running[pool.submit(job.call, *job.arguments)] = job.name
            if not running:
                raise ValueError(f"these jobs wait for one another: {', '.join(job.name for job in waiting)}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pending.discard(running.pop(future))
                future.result()
