"""``unicuco compress``: the one call, from a model and a request to a checked variant."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.backend import (
    AddressOption,
    GpusOption,
    ReplicasOption,
    check_address,
    open_backend,
)
from unicuco.cli.latency_check import CheckOption, latency_check
from unicuco.cli.learn_options import LearnChoices, with_learn_options
from unicuco.cli.plan_table import plan_table
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.prune import VariantOutOption
from unicuco.cli.request_options import RequestChoices
from unicuco.cli.shared_options import folder_here, with_fields
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


@with_learn_options
@with_fields("asked", RequestChoices, without=("context",))
def compress(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="reference, a folder, URL or hub id.")],
    out: VariantOutOption,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            parser=folder_here,
            metavar="PATH",
            help="The run to use, learned first when there is none; else OUT.run.",
        ),
    ] = None,
    *,
    asked: RequestChoices,
    learning: LearnChoices,
    address: AddressOption = "local",
    replicas: ReplicasOption = 1,
    gpus: GpusOption = None,
    check: CheckOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn a run if there is none, then cut, check and report the variant.

    The options of method and text say how a run is learned; one that is there must agree with them.
    --context is also how many tokens of a sequence --max-total-bytes counts.
    """
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        counts_cache = asked.max_total_bytes is not None
        request = replace(asked, context=learning.context if counts_cache else None).to_domain()
        check_address(address, replicas=replicas, shards=learning.shards, gpus=gpus)
        from unicuco.pipeline import Run
        from unicuco.pipeline import compress as compress_model

        place = out.resolve()  # `.` has no name
        folder = place.with_name(f"{place.name}.run") if run is None else run
        options = learning.to_domain(model, folder, replicas=replicas, resume=False)
        with ProgressDisplay() as progress:
            report = compress_model(
                options,
                request,
                out,
                backend_factory=lambda: open_backend(
                    address, replicas=replicas, shards=learning.shards, gpus=gpus
                ),
                progress=progress,
            )
        measured, lines = asdict(report.measured), list[str]()
        if check and report.plan.latency is not None:
            latency, lines = latency_check(Run.open(folder, base=model), report.plan, out)
            measured |= latency
        terminal.show(
            {**report.to_dict(), "measured": measured},
            plan_table([request], [report.plan]),
            *lines,
        )
