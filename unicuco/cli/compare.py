"""``unicuco compare``: every allocator at equal budget on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.cli.backend import (
    AddressOption,
    GpusOption,
    ReplicasOption,
    check_address,
    open_backend,
)
from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.request_options import parse_numbers
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

if TYPE_CHECKING:
    from rich.table import Table

    from unicuco.pipeline import CompareReport

_TEXT = "Text"


def compare(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="reference, a Hugging Face folder, or a hub id.")],
    allocators: Annotated[
        str, typer.Option("--allocators", help="Names, with commas between.")
    ] = "uniform,fisher,stratnet",
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Fractions in [0, 1), with commas between.")
    ] = "0.5,0.6,0.7,0.8",
    run: Annotated[
        Path | None,
        typer.Option("--run", help="What StratNet answers from; one is learned if left out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Keeps all that is measured, so that it can go on after a stop."
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it into this PNG file.")] = None,
    pruner: Annotated[
        str | None,
        typer.Option(
            "--pruner", help="wanda, magnitude or sparsegpt, for all; the run's if left out."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides all that is drawn.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Plain UTF-8 text to measure on; the embedded test text if left out.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Plain UTF-8 text that searching and learning may see.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Tokens per evaluation.", rich_help_panel=_TEXT)
    ] = 3072,
    test_tokens: Annotated[
        int,
        typer.Option(
            "--test-tokens", help="Tokens of the test text at most.", rich_help_panel=_TEXT
        ),
    ] = 16_384,
    address: AddressOption = "local",
    replicas: ReplicasOption = 1,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare allocators: each answers every sparsity, exactly, and is measured on unseen text."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        check_address(address, replicas=replicas, gpus=gpus)
        numbers = parse_numbers("--sparsity", sparsity)
        from unicuco.pipeline import CompareOptions
        from unicuco.pipeline import compare as compare_allocators

        options = CompareOptions(
            model=model,
            allocators=tuple(name.strip() for name in allocators.split(",")),
            sparsities=numbers,
            run=run,
            out=out,
            text=text,
            calibration=calibration,
            tokens=tokens,
            test_tokens=test_tokens,
            seed=seed,
            pruner=pruner,
        )
        with ProgressDisplay() as progress:
            report = compare_allocators(
                options,
                backend_factory=lambda: open_backend(address, replicas=replicas, gpus=gpus),
                progress=progress,
            )
        notes = _notes(report)
        if plot is not None:
            from rich.markup import escape

            from unicuco.plots import plot_comparison

            plot_comparison(plot, _curves(report), caption=notes[0])
            notes.append(f"drawn to {escape(str(plot))}")
        terminal.show(report.to_dict(), _table(report), "", *notes)


def _table(report: CompareReport) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("allocator", "sparsity", "KL", "perplexity", "s per request", "evaluations"):
        table.add_column(name, justify="left" if name == "allocator" else "right")
    best = {
        sparsity: min(r.kl for r in report.results if r.sparsity == sparsity)
        for sparsity in {r.sparsity for r in report.results}
    }
    for result in report.results:
        kl = f"{result.kl:.4f}"
        table.add_row(
            result.allocator,
            f"{result.sparsity:g}",
            f"[bold]{kl}[/bold]" if result.kl == best[result.sparsity] else kl,
            f"{result.perplexity:.4g}",
            f"{result.seconds_per_request:.3g}",
            f"{result.evaluations}" + (" once" if result.allocator == "stratnet" else ""),
        )
    return table


def _notes(report: CompareReport) -> list[str]:
    notes = [
        f"KL and perplexity on {report.test_tokens:,} tokens of unseen text;"
        f" searches saw {report.search_tokens:,} tokens; seed {report.results[0].seed}"
    ]
    if report.learned_s is not None:
        notes.append(
            f"a run for stratnet was learned first, in {report.learned_s:.0f} s: once for every"
            " request there will be (--run uses one that is there)"
        )
    return notes


def _curves(report: CompareReport) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in report.results:
        curves.setdefault(result.allocator, []).append((result.sparsity, result.kl))
    return curves
