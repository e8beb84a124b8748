"""The demo's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from unicuco.cli.plan_table import plan_table
from unicuco.errors import UnicucoError
from unicuco.types import Plan, Request

if TYPE_CHECKING:
    from unicuco.pipeline import EvaluationReport

_SHOWN = 10


def answers_table(requests: Sequence[Request], answers: Sequence[Plan | UnicucoError]) -> Table:
    """Return the first answers, two of every kind, and say how many follow."""
    table = plan_table(requests[:_SHOWN], answers[:_SHOWN])
    table.caption = f"… and {len(requests) - _SHOWN} more"
    table.caption_justify = "left"
    return table


def quality_table(reports: Mapping[str, EvaluationReport], sparsity: float) -> Table:
    """Return perplexity and KL on the test text, and KL relative to uniform pruning.

    Args:
        reports: by name; "dense" and "uniform" among them.
        sparsity: of all but the dense model.
    """
    tokens = reports["dense"].tokens
    uniform = reports["uniform"].kl
    table = Table(
        title=f"at sparsity {sparsity}, on {tokens:,} tokens of test text",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("")
    for name in ("perplexity", "KL, nats per token", "KL / uniform"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, report in reports.items():
        ratio = "" if name == "dense" or not uniform else f"{(report.kl or 0.0) / uniform:.2f}"
        kl = "" if name == "dense" else f"{report.kl:.4f}"
        table.add_row(name, f"{report.perplexity:.2f}", kl, ratio)
    return table
