"""``unicuco bits``: how far a model's weights can be coded, by scheme, with KL beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.request_options import parse_numbers, parse_whole_numbers
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal

if TYPE_CHECKING:
    from rich.table import Table

    from unicuco.pipeline import BitsRow


def bits(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Any model.")],
    group: Annotated[
        str, typer.Option("--group", help="Weights per scale, commas between.")
    ] = "128,32",
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Fractions dropped first, commas between.")
    ] = "0,0.5",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Of test text, and of calibration text.")
    ] = 4096,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="UTF-8 text; else the embedded one.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Test text; the embedded one if left out.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it as a PNG file.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides what is drawn.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure entropy, coded size and KL of quantised weights: the compressibility study."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        groups = parse_whole_numbers("--group", group)
        sparsities = parse_numbers("--sparsity", sparsity)
        from unicuco.pipeline import BitsOptions, study

        options = BitsOptions(
            model=model,
            groups=groups,
            sparsities=sparsities,
            tokens=tokens,
            calibration=calibration,
            text=text,
            seed=seed,
        )
        with ProgressDisplay() as progress:
            rows, measured = study(options, progress)
        note = f"bits per weight, scales counted; KL on {measured:,} tokens of unseen text; "
        note += f"seed {seed}"
        if plot is not None:
            from unicuco.plots import plot_bits

            plot_bits(plot, _curves(rows), caption=f"{model}; {note}")
        document = {"model": model, "tokens": measured, "seed": seed}
        terminal.show(
            {**document, "results": [asdict(row) for row in rows]}, _table(rows), f"[dim]{note}"
        )


def _table(rows: Sequence[BitsRow]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("scheme", "group", "sparsity", "plain", "entropy", "coded", "Gaussian", "KL"):
        table.add_column(name, justify="left" if name == "scheme" else "right")
    for row in rows:
        gaussian = "" if row.gaussian_bits is None else f"{row.gaussian_bits:.3f}"
        table.add_row(
            row.scheme,
            str(row.group or ""),
            f"{row.sparsity:g}",
            f"{row.plain_bits:.3f}",
            f"{row.entropy_bits:.3f}",
            f"{row.coded_bits:.3f}",
            gaussian,
            f"{row.kl:.4g}",
        )
    return table


def _curves(rows: Sequence[BitsRow]) -> dict[str, list[tuple[float, float]]]:
    """Return (coded bits, KL) by scheme and sparsity; steps or groups of one are one line."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        family = "int8 aware" if row.scheme.startswith("int8 aware") else row.scheme
        label = f"{family}, sparsity {row.sparsity:g}" if row.sparsity else family
        curves.setdefault(label, []).append((row.coded_bits, row.kl))
    return curves
