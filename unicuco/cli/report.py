"""``unicuco report``: a run as one HTML page that can be sent to somebody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


def report(
    ctx: typer.Context,
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page to write. Default: RUN/report.html.")
    ] = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML page: front, strategies, predictions, learning, costs."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from unicuco.pipeline import Run, write_report

        path = out or run / "report.html"
        write_report(Run.open(run, base=base), path)
        terminal.show({"report": str(path), "bytes": path.stat().st_size}, f"written to {path}")
