"""``unicuco prune``: cut a variant from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.latency_check import CheckOption, latency_check
from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.plan_table import plan_table
from unicuco.cli.request_options import RequestChoices, with_request_options
from unicuco.cli.shared_options import folder_here
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

VariantOutOption = Annotated[
    Path,
    typer.Option("--out", parser=folder_here, metavar="PATH", help="The variant folder to make."),
]


@with_request_options
def prune(
    ctx: typer.Context,
    run: RunArgument,
    out: VariantOutOption,
    *,
    asked: RequestChoices,
    base: BaseOption = None,
    check: CheckOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut the variant that a request describes: a Hugging Face folder that vLLM loads too."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        request = asked.to_domain()
        from rich.markup import escape

        from unicuco.pipeline import Run
        from unicuco.pipeline import prune as cut

        learned = Run.open(run, base=base)
        answer = cut(learned, request, out)
        measured, lines = latency_check(learned, answer, out) if check else ({}, [])
        more = {"measured": measured} if measured else {}
        terminal.show(
            {**answer.to_dict(), "out": str(out), **more},
            plan_table([request], [answer]),
            f"variant written to {escape(str(out))}",
            *lines,
        )
