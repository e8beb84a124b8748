"""General optimisers of two objectives, as rivals of learning: they ask, and are told.

All minimise (kept fraction, log (KL + EPSILON)) over the unit cube of a strategy space, from values
alone, and know nothing of sites, curves or derivatives. NSGA-II is pymoo's (Deb et al. 2002), with
its own crossover and mutation and a population that fits the budget; qLogEHVI is BoTorch's (Ament
et al. 2023): a Gaussian process of log KL, the size exact, a batch chosen point by point, each seen
at the process' mean when the next one is chosen (the joint improvement of a batch of five takes
BoTorch ten times as long). Both packages come with ``pip install unicuco[bench]``. What this module
does not know: how strategies are judged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from unicuco.search.hypervolume import WORST_KL
from unicuco.search.paper import latin_hypercube
from unicuco.space import StrategySpace
from unicuco.surrogate import EPSILON

_DESIGN: Final = 10  # points of one Latin hypercube
_POPULATION: Final = 20
_BATCH: Final = 5
_RESTARTS: Final = 4
_RAW_SAMPLES: Final = 128
_STEPS: Final = 60  # of maximising the acquisition
_FIT_STEPS: Final = 200
WORST: Final = (1.0, math.log(WORST_KL + EPSILON))  # the corner that hypervolume is counted up to


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What is optimised over: a space of sparsities, of a model with so many parameters."""

    space: StrategySpace
    total_params: int
    site_weights: int

    def kept_fraction(self, points: Tensor) -> Tensor:
        """Return the share of site weights, ``n``, that ``n x d`` unit points keep."""
        kept = self.space.cost.kept(self.space.settings(points))
        return 1.0 - (self.total_params - kept) / self.site_weights


class Optimiser(Protocol):
    """Asks for points and is told their values."""

    def ask(self) -> Tensor:
        """Return ``n x d`` float64 points of the unit cube."""

    def tell(self, points: Tensor, values: Tensor) -> None:
        """Take the ``n x 2`` values of the points that were asked last, or of the first of them."""


class RandomPoints:
    """Uniform points."""

    def __init__(self, domain: Domain, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = (_DESIGN, domain.space.num_axes)

    def ask(self) -> Tensor:
        """Return the next ones."""
        return torch.rand(self._shape, generator=self._generator, dtype=torch.float64)

    def tell(self, points: Tensor, values: Tensor) -> None:
        """Learn nothing."""


class LatinHypercubes:
    """One Latin hypercube after the other."""

    def __init__(self, domain: Domain, seed: int) -> None:
        self._num_axes, self._seed = domain.space.num_axes, seed
        self._number = 0

    def ask(self) -> Tensor:
        """Return the next design."""
        self._number += 1
        seed = self._seed + 1_000_003 * self._number
        return latin_hypercube(_DESIGN, self._num_axes, seed=seed)

    def tell(self, points: Tensor, values: Tensor) -> None:
        """Learn nothing."""


class Nsga2:
    """pymoo's NSGA-II."""

    def __init__(self, domain: Domain, seed: int) -> None:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem

        self._problem = Problem(n_var=domain.space.num_axes, n_obj=2, xl=0.0, xu=1.0)
        self._algorithm = NSGA2(pop_size=_POPULATION)
        self._algorithm.setup(self._problem, termination=("n_gen", 10**6), seed=seed)
        self._asked: Any = None  # pymoo's population has no public type

    def ask(self) -> Tensor:
        """Return a generation."""
        self._asked = self._algorithm.ask()
        return torch.from_numpy(np.array(self._asked.get("X"), dtype=np.float64))

    def tell(self, points: Tensor, values: Tensor) -> None:
        """Select among the generation and its parents; nothing where it was cut short."""
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        if len(points) == len(self._asked):
            static = StaticProblem(self._problem, F=values.numpy())
            Evaluator().eval(static, self._asked)
            self._algorithm.tell(infills=self._asked)


class ExpectedHypervolume:
    """BoTorch's qLogEHVI, after one Latin hypercube."""

    def __init__(self, domain: Domain, seed: int) -> None:
        self._domain, self._seed = domain, seed
        self._points = torch.empty(0, domain.space.num_axes, dtype=torch.float64)
        self._values = torch.empty(0, 2, dtype=torch.float64)
        self._hyperparameters: dict[str, Tensor] = {}  # of the last fit, where the next one starts

    def ask(self) -> Tensor:
        """Return the batch that is expected to add most hypervolume."""
        if not len(self._points):
            return latin_hypercube(_DESIGN, self._points.shape[1], seed=self._seed)
        torch.manual_seed(self._seed + len(self._points))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that need a second try
            return self._best_batch()

    def tell(self, points: Tensor, values: Tensor) -> None:
        """Keep them for the process."""
        self._points = torch.cat([self._points, points])
        self._values = torch.cat([self._values, values])

    def _best_batch(self) -> Tensor:
        from botorch import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        process = SingleTaskGP(self._points, -self._values[:, 1:])  # BoTorch maximises
        process.load_state_dict({**process.state_dict(), **self._hyperparameters})
        fit_gpytorch_mll(
            ExactMarginalLogLikelihood(process.likelihood, process),
            optimizer_kwargs={"options": {"maxiter": _FIT_STEPS}},
        )
        self._hyperparameters = {
            name: value.detach().clone() for name, value in process.named_parameters()
        }
        values, batch = -self._values, self._points[:0]
        for _ in range(_BATCH):
            point = self._best_point(process, values)
            with torch.no_grad():
                believed = process.posterior(point).mean
            process = process.condition_on_observations(point, believed)
            values = torch.cat([values, torch.cat([self._size(point), believed], dim=-1)])
            batch = torch.cat([batch, point])
        return batch

    def _size(self, points: Tensor) -> Tensor:
        """Return the negative of what ``… x d`` points keep, ``… x 1``."""
        kept = self._domain.kept_fraction(points.reshape(-1, points.shape[-1]))
        return -kept.reshape(*points.shape[:-1], 1)

    def _best_point(self, process: Any, values: Tensor) -> Tensor:
        """Return the point, ``1 x d``, expected to add most to the front of ``n x 2`` values."""
        from botorch.acquisition.multi_objective.logei import (
            qLogExpectedHypervolumeImprovement,
        )
        from botorch.models import ModelList
        from botorch.models.deterministic import GenericDeterministicModel
        from botorch.optim import optimize_acqf
        from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning

        worst = -torch.tensor(WORST, dtype=torch.float64)
        acquisition = qLogExpectedHypervolumeImprovement(
            ModelList(GenericDeterministicModel(self._size), process),
            ref_point=worst,
            partitioning=FastNondominatedPartitioning(worst, values),
        )
        point, _ = optimize_acqf(
            acquisition,
            bounds=torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(
                2, self._points.shape[1]
            ),
            q=1,
            num_restarts=_RESTARTS,
            raw_samples=_RAW_SAMPLES,
            options={"maxiter": _STEPS},
        )
        return point.detach()


OPTIMISERS: Final[dict[str, Callable[[Domain, int], Optimiser]]] = {
    "random": RandomPoints,
    "latin hypercubes": LatinHypercubes,
    "nsga2": Nsga2,
    "qlogehvi": ExpectedHypervolume,
}
