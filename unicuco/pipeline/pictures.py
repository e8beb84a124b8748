"""The pictures of a run, drawn from what the run folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unicuco.plots import plot_front, plot_strategies

if TYPE_CHECKING:
    from unicuco.pipeline.run import Run


def draw_front(run: Run, path: Path) -> None:
    """Draw the front of a run: predictions, and what was measured on the validation text."""
    measured = run.validation
    plot_front(
        path,
        run.planner.front(60),
        measured["stratnet"],
        measured["uniform"],
        fisher=measured["fisher"],
        caption=_caption(run),
    )


def draw_strategies(run: Run, path: Path) -> None:
    """Draw how each target is spread over the sites, as StratNet decides it."""
    low, high = run.sparsity_range
    targets = np.linspace(max(0.1, low), high, 17)
    sites = run.profile.sites
    cost = run.planner.space.cost
    columns = [cost.site_losses(s.values) for s in run.planner.along(targets.tolist())]
    names = [f"{site.block}.{site.path.rsplit('.', 1)[-1]}" for site in sites]
    plot_strategies(path, targets.tolist(), names, np.array(columns).T, caption=_caption(run))


def _caption(run: Run) -> str:
    manifest = run.manifest
    return (
        f"{manifest['base_model']['path']}, {manifest['evaluations']} evaluations, "
        f"{manifest['cost_units']:.0f} units, {manifest['options']['tokens']} validation tokens, "
        f"seed {manifest['options']['seed']}"
    )
