"""``unicuco plan``: strategy and prediction for one request, or for many in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.plan_table import answer_document, plan_table, refusals
from unicuco.cli.request_options import (
    MaxBytesOption,
    MaxKlOption,
    MaxParamsOption,
    PreferenceOption,
    ServedAsOption,
    SparsityOption,
    TaskWeightsOption,
    read_request,
    read_requests_file,
)
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal
from unicuco.errors import RequestError, UnicucoError

BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Where the base model lies now, if not where it was learned."),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, made by learn.")]


def plan(
    ctx: typer.Context,
    run: RunArgument,
    sparsity: SparsityOption = None,
    max_params: MaxParamsOption = None,
    max_bytes: MaxBytesOption = None,
    max_kl: MaxKlOption = None,
    preference: PreferenceOption = None,
    served_as: ServedAsOption = None,
    task_weights: TaskWeightsOption = None,
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
        options = {
            "sparsity": sparsity,
            "max_params": max_params,
            "max_bytes": max_bytes,
            "max_kl": max_kl,
            "preference": preference,
        }
        if requests is None:
            asked = [read_request(**options, served_as=served_as, task_weights=task_weights)]
        elif all(value is None for value in (served_as, task_weights, *options.values())):
            asked = read_requests_file(requests)
        else:
            raise RequestError("give either --requests or a request's own options, not both")
        from unicuco.pipeline import Run

        answers = Run.open(run, base=base).plan(asked)
        if requests is not None:
            documents = [answer_document(answer) for answer in answers]
            notes = refusals(answers)
            terminal.show({"answers": documents}, plan_table(asked, answers), *notes)
            return
        (answer,) = answers
        if isinstance(answer, UnicucoError):
            raise answer
        terminal.show(answer.to_dict(), plan_table(asked, answers))
