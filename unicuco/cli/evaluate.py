"""``unicuco evaluate``: what a variant is worth on text that nothing learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unicuco.cli.progress import ProgressDisplay
from unicuco.cli.terminal import DebugOption, JsonOption, open_terminal


def evaluate(
    ctx: typer.Context,
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A variant or any model, as a folder or URL.")
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The dense model to measure KL against.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Plain UTF-8 text; the embedded test text if left out."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens at most; all if left out.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure perplexity, KL against the dense model, and realised sparsity."""
    with open_terminal(ctx, as_json=as_json, debug=debug) as terminal:
        from unicuco.pipeline import evaluate_variant

        with ProgressDisplay() as progress:
            report = evaluate_variant(
                folder, reference=reference, text=text, tokens=tokens, progress=progress
            )
        kl = "not measured (name the dense model: --reference)"
        if report.kl is not None:
            kl = f"{report.kl:.4g} nats per token"
        terminal.show(
            {
                "perplexity": report.perplexity,
                "kl": report.kl,
                "sparsity": report.sparsity,
                "tokens": report.tokens,
                "context": report.context,
            },
            f"perplexity  {report.perplexity:.4g}",
            f"KL          {kl}",
            f"sparsity    {report.sparsity:.4f}",
            f"measured on {report.tokens:,} tokens in windows of {report.context}",
        )
