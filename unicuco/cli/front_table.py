"""A front as tables for people: what is predicted, and apart from it what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from unicuco.pipeline import FrontPoint

_UNIT = "KL in nats per token"


def front_table(points: Sequence[FrontPoint]) -> Table:
    """Return one row per sparsity of the learned range, predicted."""
    table = _table(f"predicted, {_UNIT}", "sparsity", "mean", "95% interval")
    for point in points:
        kl = point.kl
        interval = f"{kl.lo95:.4g} … {kl.hi95:.4g}"
        table.add_row(f"{point.sparsity:.2f}", f"{kl.mean:.4g}", interval)
    return table


def measured_table(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Table:
    """Return one row per sparsity at which anything was measured on the validation text.

    Args:
        curves: allocator name -> points (sparsity, KL).
    """
    table = _table(f"measured on validation text, {_UNIT}", "sparsity", *curves)
    by_name = {name: dict(curve) for name, curve in curves.items()}
    for sparsity in sorted({sparsity for curve in by_name.values() for sparsity in curve}):
        cells = (curve.get(sparsity) for curve in by_name.values())
        table.add_row(f"{sparsity:.2f}", *("" if kl is None else f"{kl:.4g}" for kl in cells))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
