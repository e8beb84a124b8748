"""``unicuco report``: a run as one HTML page that can be sent to somebody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal
from unicuco.errors import RequestError
from unicuco.remote import local_path


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
        if out is None:
            folder = local_path(run)
            if folder is None:
                raise RequestError("the page of a run at a URL needs a place: name it with --out")
            out = folder / "report.html"
        from unicuco.pipeline import Run, write_report

        write_report(Run.open(run, base=base), out)
        terminal.show({"report": str(out), "bytes": out.stat().st_size}, f"written to {out}")
