"""A run's surrogate as the prior of another run's; see `unicuco.search.transfer`.

It is kept in the new run's folder, ``guide.safetensors``, so that it goes on without the other.
"""

from __future__ import annotations

from typing import Final

from unicuco.errors import RequestError
from unicuco.pipeline.files import load_tensors, save_tensors
from unicuco.pipeline.options import LearnOptions
from unicuco.pipeline.run import Run
from unicuco.search.transfer import make_prior
from unicuco.space import StrategySpace
from unicuco.surrogate import Prior, TextForecast
from unicuco.tensors import named_under
from unicuco.types import ServedAs

_KEPT: Final = "guide.safetensors"
_PRIOR: Final = "prior/"


def take_prior(options: LearnOptions, space: StrategySpace) -> Prior:
    """Return the prior that another run gives, and keep it; of a resumed run the one that was kept.

    Args:
        options: of the new run, which name the other.
        space: of the new run.

    Raises:
        RequestError: the other run is of another architecture, granularity or preset, or not of
            masks.
        RunError: it is none, or damaged.
    """
    kept = options.out / _KEPT
    if not (options.resume and kept.is_file()):
        prior = _prior(Run.open(options.warm_from), space)
        save_tensors(kept, {_PRIOR + name: tensor for name, tensor in prior.state().items()})
    return Prior.restore(named_under(_PRIOR, load_tensors(kept)))


def _prior(run: Run, space: StrategySpace) -> Prior:
    planner = run.planner
    if planner.space.cost.served_as is not ServedAs.MASK or run.tasks:
        raise RequestError(
            f"warm-from needs a run of the dimension sparsity without tasks; {run.folder} is none"
        )
    forecast = run.forecast()
    assert isinstance(forecast, TextForecast), "runs of several tasks were refused"
    return make_prior(planner.space, space, forecast.surrogate)
