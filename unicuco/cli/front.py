"""``unicuco front``: the trade-off front of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.front_table import front_table, measured_table
from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


def front(
    ctx: typer.Context,
    run: RunArgument,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this PNG file.")] = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show quality against size: what the run predicts, and what was measured."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from rich.markup import escape

        from unicuco.pipeline import Run

        learned = Run.open(run, base=base)
        notes = []
        if plot is not None:
            from unicuco.pipeline import draw_front

            draw_front(learned, plot)
            notes.append(f"drawn to {escape(str(plot))}")
        terminal.show(
            learned.front_document(),
            front_table(learned.front()),
            "",
            measured_table(learned.validation),
            *notes,
        )
