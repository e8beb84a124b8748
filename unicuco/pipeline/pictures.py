"""The pictures of a run, drawn from what the run folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unicuco.plots import plot_front, plot_strategies
from unicuco.types import Request, Target

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
    """Draw how each sparsity is spread over the sites, as StratNet decides it."""
    low, high = run.sparsity_range
    targets = np.linspace(max(0.1, low), high, 17)
    plans = run.planner.plan([Request(target=Target.SPARSITY, value=float(t)) for t in targets])
    sites = run.profile.sites
    columns = []
    for plan in plans:
        assert not isinstance(plan, Exception), "targets lie inside the learned range"
        drops = run.planner.space.cost.site_drops(plan.strategy.values)
        columns.append([drops[site.path] / site.num_weights for site in sites])
    names = [f"{site.block}.{site.path.rsplit('.', 1)[-1]}" for site in sites]
    plot_strategies(path, targets.tolist(), names, np.array(columns).T, caption=_caption(run))


def _caption(run: Run) -> str:
    manifest = run.manifest
    return (
        f"{manifest['base_model']['path']}, {manifest['evaluations']} evaluations, "
        f"{manifest['cost_units']:.0f} units, {manifest['options']['tokens']} validation tokens, "
        f"seed {manifest['options']['seed']}"
    )
