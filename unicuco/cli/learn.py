"""``unicuco learn``: learn a run for one base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.backend import AddressOption, ReplicasOption, check_address, open_backend
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.run_summary import describe_run, run_document
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

_METHOD = "Method"
_TEXT = "Text"


def learn(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="reference, a Hugging Face folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The run folder to make.")],
    pruner: Annotated[
        str,
        typer.Option(
            "--pruner",
            help="wanda, magnitude, or sparsegpt, which updates what stays and keeps levels.",
            rich_help_panel=_METHOD,
        ),
    ] = "wanda",
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity",
            help="layer: one axis per site; block: one per block.",
            rich_help_panel=_METHOD,
        ),
    ] = "layer",
    dimensions: Annotated[
        str,
        typer.Option("--dimensions", help="Names, with commas between.", rich_help_panel=_METHOD),
    ] = "sparsity",
    preset: Annotated[
        str,
        typer.Option("--preset", help="default, or paper as published.", rich_help_panel=_METHOD),
    ] = "default",
    max_sparsity: Annotated[
        float,
        typer.Option("--max-sparsity", help="Up to where it learns.", rich_help_panel=_METHOD),
    ] = 0.9,
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations",
            min=1,
            help="Strategies evaluated in all, also with --resume.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Decides all that is drawn.", rich_help_panel=_METHOD)
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_METHOD)
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Plain UTF-8 text.", rich_help_panel=_TEXT),
    ] = None,
    calibration_sampling: Annotated[
        str,
        typer.Option(
            "--calibration-sampling",
            help="even: spread over the text; clustered: equally many per kind of window.",
            rich_help_panel=_TEXT,
        ),
    ] = "even",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="NAME=FILE, twice or more: texts that requests may weigh, for --calibration.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=1, help="Tokens per evaluation.", rich_help_panel=_TEXT),
    ] = 3072,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Tokens per window; the model's own if left out.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    address: AddressOption = "local",
    replicas: ReplicasOption = 1,
    shards: Annotated[
        int, typer.Option("--shards", min=1, help="Parts per copy.", rich_help_panel="Cluster")
    ] = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn, once per base model, how it compresses.

    Afterwards [bold]plan[/bold] and [bold]prune[/bold] answer any request from the run folder.
    """
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        check_address(address, replicas=replicas)
        from unicuco.pipeline import LearnOptions
        from unicuco.pipeline import learn as learn_run
        from unicuco.pipeline.options import parse_tasks

        options = LearnOptions(
            model=model,
            out=out,
            pruner=pruner,
            granularity=granularity,
            dimensions=tuple(name.strip() for name in dimensions.split(",")),
            preset=preset,
            evaluations=evaluations,
            replicas=replicas,
            shards=shards,
            calibration=calibration,
            calibration_sampling=calibration_sampling,
            tasks=parse_tasks(tasks or ()),
            tokens=tokens,
            context=context,
            seed=seed,
            resume=resume,
            max_sparsity=max_sparsity,
        )
        backend = open_backend(address, replicas=replicas)
        with ProgressDisplay() as progress:
            run = learn_run(options, backend=backend, progress=progress)
        terminal.show(run_document(run), describe_run(run))
