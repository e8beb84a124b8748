"""``unicuco learn``: learn a run for one base model."""

from __future__ import annotations

from typing import Annotated

import typer

from unicuco.cli.backend import (
    AddressOption,
    GpusOption,
    ReplicasOption,
    check_address,
    open_backend,
)
from unicuco.cli.learn_options import LearnChoices, with_learn_options
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.run_summary import describe_run, run_document
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


@with_learn_options
def learn(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="reference, a folder, URL or hub id.")],
    out: Annotated[str, typer.Option("--out", help="The run to make: a folder, or a URL.")],
    learning: LearnChoices,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel="Method"),
    ] = False,
    store: Annotated[
        str,
        typer.Option(
            "--store",
            help="Database URL that records the run; a file in its folder if left out.",
            rich_help_panel="Cluster",
        ),
    ] = "",
    address: AddressOption = "local",
    replicas: ReplicasOption = 1,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn, once per base model, how it compresses.

    Afterwards [bold]plan[/bold] and [bold]prune[/bold] answer any request from the run folder.
    """
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        check_address(address, replicas=replicas, shards=learning.shards, gpus=gpus)
        from unicuco.pipeline import learn as learn_run
        from unicuco.pipeline.publishing import run_place

        folder, publish_to = run_place(out)
        options = learning.to_domain(
            model, folder, replicas=replicas, resume=resume, publish_to=publish_to, store=store
        )
        backend = open_backend(address, replicas=replicas, shards=learning.shards, gpus=gpus)
        with ProgressDisplay() as progress:
            run = learn_run(options, backend=backend, progress=progress)
        terminal.show(run_document(run, options.place), describe_run(options.place))
