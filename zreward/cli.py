"""The command line: `zreward COMMAND`, one handler a command in `zreward.commands`.

Exit status 0 for success, 1 for a job that failed (also where only some of its items did), 2 for a call
that cannot be carried out as written, 130 after Ctrl-C.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zreward import __version__
from zreward.commands import (
    bench,
    bundles,
    conformance,
    data,
    demo,
    engine,
    evaluate,
    export,
    plugins,
    quantize,
    score,
    train,
)
from zreward.commands.console import say
from zreward.errors import ZrewardError


class _Commands(TyperGroup):
    """Commands of two words stand beside the command of the first alone: `bench compare` beside `bench BUNDLE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words in self.commands else args)


app = typer.Typer(
    name="zreward",
    cls=_Commands,
    help="Deploy visual reward models: four rubric scores of an image in one look.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.command("engine")(engine.engine)
app.command("contract")(export.contract)
app.command("inspect")(bundles.inspect)
app.command("verify")(bundles.verify)
app.command("score")(score.score)
app.command("bench")(bench.bench)
app.command("bench compare")(bench.bench_compare)
app.command("conformance")(conformance.conformance)
app.command("eval")(evaluate.evaluate)
app.command("train")(train.train)

data_app = typer.Typer(help="Make data sets.", no_args_is_help=True)
data_app.command("scenes")(data.scenes)
data_app.command("benchmark")(data.benchmark)
data_app.command("chains")(data.chains)
data_app.command("convert")(data.convert)
app.add_typer(data_app, name="data")

plugins_app = typer.Typer(help="Build and check the TensorRT plugins.", no_args_is_help=True)
plugins_app.command("build")(plugins.build)
plugins_app.command("check")(plugins.check)
app.add_typer(plugins_app, name="plugins")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"zreward {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
]


@app.callback()
def _root(version: VersionOption = False) -> None:
    pass


def main() -> None:
    """Run the command line; a deliberate error is its message on stderr and its exit status."""
    _tolerate_any_text()
    try:
        app()
    except ZrewardError as error:
        say(f"error: {error}")
        sys.exit(error.exit_status)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission
        say(f"error: {error}")
        sys.exit(1)
    finally:
        _flush_or_drop()


def _tolerate_any_text() -> None:
    """Print what the terminal's encoding lacks as escapes, instead of failing on a file name or a ±."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_drop() -> None:
    """Flush here, where a reader that went away can be met quietly, not while Python shuts down."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
