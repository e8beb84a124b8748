"""``unicuco plan``: strategy and prediction for one request, or for many in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.plan_table import answer_document, plan_table, refusals
from unicuco.cli.request_options import RequestChoices, read_requests_file, with_request_options
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal
from unicuco.errors import RequestError, UnicucoError

BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Where the base model lies now, if not where it was learned."),
]
RunArgument = Annotated[str, typer.Argument(help="A run, made by learn: a folder, or a URL.")]


@with_request_options
def plan(
    ctx: typer.Context,
    run: RunArgument,
    *,
    asked: RequestChoices,
    requests: Annotated[
        Path | None,
        typer.Option("--requests", help="One JSON request per line; - reads standard input."),
    ] = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer requests with strategies and predictions; touches no weights."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        if requests is None:
            given = [asked.to_domain()]
        elif asked.is_empty:
            given = read_requests_file(requests)
        else:
            raise RequestError("give either --requests or a request's own options, not both")
        from unicuco.pipeline import Run

        answers = Run.open(run, base=base).plan(given)
        if requests is not None:
            documents = [answer_document(answer) for answer in answers]
            notes = refusals(answers)
            terminal.show({"answers": documents}, plan_table(given, answers), *notes)
            return
        (answer,) = answers
        if isinstance(answer, UnicucoError):
            raise answer
        terminal.show(answer.to_dict(), plan_table(given, answers))
