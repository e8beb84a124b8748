"""The application: its commands, and the one place where an error becomes an exit code and a line.

Exit codes: 0 done, 2 wrong use, 3 a request that can't be met, 1 anything else. What it does not
know: what any command does.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from unicuco.cli import (
    bits,
    compare,
    compress,
    doctor,
    evaluate,
    front,
    generate,
    latency,
    learn,
    pack,
    plan,
    prune,
    report,
    serve,
    unpack,
)
from unicuco.cli.terminal import Invocation
from unicuco.failure import describe_failure

app = typer.Typer(
    name="unicuco",
    help="Learn once how a language model compresses, then answer any compression request at once.",
    add_completion=False,
    rich_markup_mode="rich",
)
app.command()(compress.compress)
app.command()(learn.learn)
app.command()(plan.plan)
app.command()(prune.prune)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(front.front)
app.command()(report.report)
app.command()(generate.generate)
app.command()(pack.pack)
app.command()(unpack.unpack)
app.command()(bits.bits)
app.command()(latency.latency)
app.command()(serve.serve)
app.command()(doctor.doctor)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Learn once how a language model compresses, then answer any compression request at once."""
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(installed_version("unicuco"))
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: the words after ``unicuco``; none reads them from the process.
    """
    invocation = Invocation()
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="unicuco",
            standalone_mode=False,
            obj=invocation,
        )
    except (Exception, KeyboardInterrupt) as error:
        failure = describe_failure(error)
        if invocation.debug:
            traceback.print_exc()
        usage = failure.usage or (invocation.usage if failure.exit_code == 2 else "")
        for line in (usage, failure.line):
            if line:
                print(line, file=sys.stderr)
        return failure.exit_code
    return int(code or 0)
