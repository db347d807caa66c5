"""Where the command line writes: results on stdout, talk on stderr, progress bars only on a terminal.

rich is imported inside the functions, because `zreward --help` and a shell completion need none of it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as ProgressBar
    from rich.table import Table

    from zreward.progress import Progress

Unit = Literal["items", "MB", "%"]


def stdout() -> Console:
    """For results."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, emoji=False)


def stderr() -> Console:
    """For everything that is not a result."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, emoji=False)


def say(message: str) -> None:
    """One line of talk; never wrapped, so that a path in it can be copied."""
    stderr().print(message, markup=False, soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """`value` on stdout for machines; with `indent=None` on one line."""
    sys.stdout.write(json.dumps(value, indent=indent, allow_nan=False) + "\n")


def print_fact(name: str, value: object, *, width: int = 12) -> None:
    """One `name  value` line of a result, the value unwrapped."""
    stdout().print(f"{name:<{width}} {value}", markup=False, soft_wrap=True)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one look of all commands: the first column left, the others right.

    Where the terminal is too narrow, the first column is folded and the figures stay whole.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    first, *others = columns
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_facts(found: Mapping[str, str]) -> None:
    """Names and values of a result, the values wrapped beside their names."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.items():
        table.add_row(f"{name:<12}", Text(value))
    stdout().print(table)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """A `plain_table` with its rows."""
    table = plain_table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


_COUNTED = ("scoring", "measuring")  # stages that count items, whatever the others count


@contextmanager
def progress(unit: Unit = "items") -> Iterator[Progress]:
    """A callback that shows one bar per stage on a terminal, and one line per stage elsewhere.

    `unit` says how the work is shown; for "MB" and "%" it is counted in bytes.
    """
    console = stderr()
    if not console.is_terminal:
        yield _line_per_stage()
        return
    with _bar(console) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, amount="")
            shown = _amount(done, total, "items" if stage.startswith(_COUNTED) else unit)
            bar.update(tasks[stage], completed=done, total=total, amount=shown)

        yield update


def _line_per_stage() -> Progress:
    seen: set[str] = set()

    def update(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            say(f"{stage} …")

    return update


def _amount(done: int, total: int, unit: Unit) -> str:
    if total <= 1:  # a stage that only begins and ends
        return ""
    if unit == "MB":
        return f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
    return f"{done / total:.0%}" if unit == "%" else f"{done:,} of {total:,}"


def _bar(console: Console) -> ProgressBar:
    from rich import progress as rich_progress

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.TextColumn("{task.fields[amount]}", markup=False),
        rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


@contextmanager
def working(message: str) -> Iterator[None]:
    """`message` with a spinner on a terminal and as a line elsewhere, for work without a known length."""
    console = stderr()
    if not console.is_terminal:
        say(f"{message} …")
        yield
        return
    with console.status(message):
        yield


@contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C inside raises KeyboardInterrupt at once, and again from the function that is yielded.

    Python drops an exception that is raised inside a destructor or a callback from C, and the job would go on.
    """
    interrupted = False

    def remember(_number: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def stop_if_interrupted() -> None:
        if interrupted:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may set a handler
        yield stop_if_interrupted
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield stop_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)
