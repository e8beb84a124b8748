"""The options of learning, declared once for the commands that learn.

A command that takes them is decorated with `with_learn_options` and has one parameter ``learning``;
Typer sees the options in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from unicuco.cli.shared_options import with_fields

if TYPE_CHECKING:
    from unicuco.pipeline import LearnOptions

_METHOD: Final = "Method"
_TEXT: Final = "Text"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnChoices:
    """What learning can be told on the command line; as `LearnOptions`, not yet checked."""

    pruner: Annotated[
        str,
        typer.Option(
            "--pruner",
            help="wanda, magnitude, or sparsegpt, which updates what stays and keeps levels.",
            rich_help_panel=_METHOD,
        ),
    ] = "wanda"
    granularity: Annotated[
        str,
        typer.Option(
            "--granularity",
            help="layer: an axis per site (depth: attention, MLP); block: one per block.",
            rich_help_panel=_METHOD,
        ),
    ] = "layer"
    dimensions: Annotated[
        str,
        typer.Option(
            "--dimensions",
            help="sparsity, weight_bits, kv_bits; or depth, width and one of sparsity, low_rank.",
            rich_help_panel=_METHOD,
        ),
    ] = "sparsity"
    rounding: Annotated[
        str,
        typer.Option(
            "--rounding",
            help="Of weight_bits: nearest, or gptq, which makes up for each column's error.",
            rich_help_panel=_METHOD,
        ),
    ] = "nearest"
    preset: Annotated[
        str,
        typer.Option("--preset", help="default, or paper as published.", rich_help_panel=_METHOD),
    ] = "default"
    max_sparsity: Annotated[
        float,
        typer.Option("--max-sparsity", help="Up to where it learns.", rich_help_panel=_METHOD),
    ] = 0.9
    evaluations: Annotated[
        int | None,
        typer.Option(
            "--evaluations",
            min=1,
            help="Strategies evaluated in all, also of a run that goes on.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    round_size: Annotated[
        int | None,
        typer.Option(
            "--round-size",
            min=1,
            help="Strategies asked at a time; many replicas want many.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    screen_tokens: Annotated[
        int | None,
        typer.Option(
            "--screen-tokens",
            min=1,
            help="Judge alternatives on so many tokens first, and the best of them on --tokens.",
            rich_help_panel=_METHOD,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option("--seed", help="Decides all that is drawn.", rich_help_panel=_METHOD)
    ] = 0
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Plain UTF-8 text.", rich_help_panel=_TEXT),
    ] = None
    calibration_sampling: Annotated[
        str,
        typer.Option(
            "--calibration-sampling",
            help="even: spread over the text; clustered: equally many per kind of window.",
            rich_help_panel=_TEXT,
        ),
    ] = "even"
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="NAME=FILE, twice or more: texts that requests may weigh, for --calibration.",
            rich_help_panel=_TEXT,
        ),
    ] = None
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=1, help="Tokens per evaluation.", rich_help_panel=_TEXT),
    ] = 3072
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Tokens per window; the model's own if left out.",
            rich_help_panel=_TEXT,
        ),
    ] = None
    warm_from: Annotated[
        str,
        typer.Option(
            "--warm-from",
            metavar="RUN",
            help="Start from what another run of this architecture, or of another pruner, learned.",
            rich_help_panel=_METHOD,
        ),
    ] = ""
    shards: Annotated[
        int, typer.Option("--shards", min=1, help="Parts per copy.", rich_help_panel="Cluster")
    ] = 1

    def to_domain(
        self,
        model: str,
        out: Path,
        *,
        replicas: int,
        resume: bool,
        publish_to: str = "",
        store: str = "",
    ) -> LearnOptions:
        """Return the options of learning one run.

        Raises:
            RequestError: an option outside its range, or an unknown name.
        """
        from unicuco.pipeline import LearnOptions
        from unicuco.pipeline.options import parse_tasks

        same = {name: getattr(self, name) for name in _SAME}
        return LearnOptions(
            model=model,
            out=out,
            dimensions=tuple(name.strip() for name in self.dimensions.split(",")),
            tasks=parse_tasks(self.tasks or ()),
            replicas=replicas,
            resume=resume,
            publish_to=publish_to,
            store=store,
            **same,
        )


_NAMES: Final = tuple(field.name for field in fields(LearnChoices))
_SAME: Final = tuple(name for name in _NAMES if name not in ("dimensions", "tasks"))


with_learn_options = with_fields("learning", LearnChoices)
