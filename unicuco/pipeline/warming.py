"""A run's answers and surrogate as the guide of another run; see `unicuco.search.transfer`.

They are kept in the new run's folder, ``guide.safetensors``, so that it goes on without the other.
"""

from __future__ import annotations

from typing import Final

import torch

from unicuco.errors import RequestError
from unicuco.pipeline.files import load_tensors, save_tensors
from unicuco.pipeline.options import LearnOptions
from unicuco.pipeline.run import Run
from unicuco.search.transfer import Guide, carried_over, make_prior
from unicuco.space import StrategySpace
from unicuco.surrogate import TextForecast
from unicuco.types import Plan, Request, ServedAs, Target

GUIDE: Final = "guide.safetensors"
_ANSWERS: Final = 33


def make_guide(options: LearnOptions, space: StrategySpace) -> Guide:
    """Return the guide that another run gives, and keep it; of a resumed run the one that was kept.

    Args:
        options: of the new run, which name the other.
        space: of the new run.

    Raises:
        RequestError: the other run is of another architecture or granularity, or not of masks.
        RunError: it is none, or damaged.
    """
    kept = options.out / GUIDE
    if not (options.resume and kept.is_file()):
        save_tensors(kept, _guide(Run.open(options.warm_from), space).state())
    return Guide.restore(load_tensors(kept))


def _guide(run: Run, space: StrategySpace) -> Guide:
    planner = run.planner
    if planner.space.cost.served_as is not ServedAs.MASK or run.tasks:
        raise RequestError(
            f"warm-from needs a run of the dimension sparsity without tasks; {run.folder} is none"
        )
    low, high = run.sparsity_range
    sparsities = torch.linspace(low, high, _ANSWERS, dtype=torch.float64)
    asked = [Request(target=Target.SPARSITY, value=value) for value in sparsities.tolist()]
    strategies = [plan.strategy for plan in run.plan(asked) if isinstance(plan, Plan)]
    points = carried_over(planner.space, space, planner.space.encode(strategies))
    forecast = run.forecast()
    assert isinstance(forecast, TextForecast), "runs of several tasks were refused"
    prior = make_prior(planner.space, space, forecast.surrogate)
    return Guide(sparsities=sparsities, points=points, prior=prior)
