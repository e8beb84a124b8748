"""``unicuco prune``: cut a variant from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.plan import BaseOption, RunArgument
from unicuco.cli.plan_table import plan_table
from unicuco.cli.request_options import (
    MaxBytesOption,
    MaxKlOption,
    MaxParamsOption,
    PreferenceOption,
    ServedAsOption,
    SparsityOption,
    TaskWeightsOption,
    read_request,
)
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

VariantOutOption = Annotated[Path, typer.Option("--out", help="The variant folder to make.")]


def prune(
    ctx: typer.Context,
    run: RunArgument,
    out: VariantOutOption,
    sparsity: SparsityOption = None,
    max_params: MaxParamsOption = None,
    max_bytes: MaxBytesOption = None,
    max_kl: MaxKlOption = None,
    preference: PreferenceOption = None,
    served_as: ServedAsOption = None,
    task_weights: TaskWeightsOption = None,
    base: BaseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut the variant that a request describes: a Hugging Face folder that vLLM loads too."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        request = read_request(
            sparsity=sparsity,
            max_params=max_params,
            max_bytes=max_bytes,
            max_kl=max_kl,
            preference=preference,
            served_as=served_as,
            task_weights=task_weights,
        )
        from rich.markup import escape

        from unicuco.pipeline import Run
        from unicuco.pipeline import prune as cut

        answer = cut(Run.open(run, base=base), request, out)
        terminal.show(
            {**answer.to_dict(), "out": str(out)},
            plan_table([request], [answer]),
            f"variant written to {escape(str(out))}",
        )
