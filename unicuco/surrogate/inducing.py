"""The Gaussian process over more rows than can be factored, by its values at some inducing points.

What is known of the function is taken to be its values u at m of the evaluated points; all N rows,
values and derivatives alike, tell of them. That is the projected process (deterministic training
conditional; Seeger et al. 2003, Quinonero-Candela and Rasmussen 2005, section 5), and deviations
count what u leaves open as the exact process does. Fitting costs m^2 N, predicting m^2: with 600
points and 8,000 rows less than an exact process of 1,600 rows. Of 2,000 evaluations it foretells
better, for it has seen more of them (`python -m benchmarks.refit`). Of a few hundred it would not:
u says little of a derivative then, and what it leaves open of one passes for signal. Where axes
interact strongly some of that remains: `left_out` errors are then large for their variances, so
that deviations are scaled up, and near the newest evaluations the exact process may be ahead.

Hyperparameters are fitted to parts of the rows, each told by some of its own points, in FITC's
likelihood (Snelson and Ghahramani 2006): what u leaves open of a row counts as noise of its own. So
a step sees three times the rows that an exact one could in its time, and finds the axes that matter
most, whose lengthscales the latter hardly moves. Predictions count it as signal, and the scale is
then, near the one found, the likeliest a posteriori given u, by its closed form along the
eigenvectors of what the rows tell. With FITC's noise predictions are worse, and its scale is half
as large. Noise far beyond what the rows are said to have is followed more closely than by small
steps of the exact likelihood. The variational bound (Titsias 2009) also takes off what u leaves
open, and then chooses scales a tenth as large and deviations that are too small.

What it does not know: mean functions, and which rows it is given.

Notation: m inducing points, N rows, q query points, s the scale; K the covariance at scale 1, L the
factor of K_uu, A = L^-1 K_uf, W the rows' inverse noise, G = A W A', b = A W y.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from unicuco.errors import SurrogateError
from unicuco.surrogate.kernel import DirectionalMatern, as_rows, is_value
from unicuco.surrogate.process import Rows, ascend, evaluations, fit_scale, kernel_for, make_kernel
from unicuco.tensors import named_under

_JITTER: Final = 1e-8  # of variances of 1: points may nearly be the same
_LEARNING_RATE: Final = 0.3  # at first; it falls to nothing, along a cosine


def tuned_kernel(turns: Sequence[Rows], steps: int, most: int) -> Any:
    """Return a kernel with hyperparameters fitted in turns, by at most so many inducing points."""
    kernel = kernel_for(turns[0])
    rates = [
        _LEARNING_RATE * (1 + math.cos(math.pi * step / (steps + 1))) / 2 for step in range(steps)
    ]
    ascend(
        kernel, turns, lambda turn: log_likelihood(kernel, _spread_points(turn, most), turn), rates
    )
    return kernel


def _spread_points(data: Rows, most: int) -> Tensor:
    """Return so many of the rows' points, or all, evenly spread in age."""
    values = data.rows[is_value(data.rows)]
    places = torch.linspace(0, len(values) - 1, min(most, len(values))).round().long()
    return values[places, : (values.shape[1] - 1) // 2]


def log_likelihood(kernel: Any, points: Tensor, data: Rows) -> Tensor:
    """Return FITC's log likelihood of rows by inducing points; differentiable in the kernel."""
    base, scale = kernel.base_kernel, kernel.outputscale
    features = _features(base, points, data.rows, _factor_of(base, as_rows(points)))
    left_open = base.forward(data.rows, data.rows, diag=True) - features.square().sum(0)
    noise = data.noise + scale * left_open.clamp(min=0.0)
    weighed = features / noise
    factor = psd_safe_cholesky(_identity(len(points)) + scale * weighed @ features.mT)
    moment = (weighed @ data.targets)[:, None]
    told = torch.linalg.solve_triangular(factor, moment, upper=False).square().sum()
    misfit = (data.targets.square() / noise).sum() - scale * told
    likelihood: Tensor = (
        -0.5 * misfit - 0.5 * (2 * math.pi * noise).log().sum() - factor.diagonal().log().sum()
    )
    return likelihood


def _features(base: DirectionalMatern, points: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
    """Return A, ``m x N``."""
    cross = base.value_rows(points, rows)
    features: Tensor = torch.linalg.solve_triangular(factor, cross, upper=False)
    return features


def _factor_of(base: DirectionalMatern, inducing: Tensor) -> Tensor:
    """Return L."""
    covariance = base.forward(inducing, inducing)
    factor: Tensor = psd_safe_cholesky(covariance + _JITTER * _identity(len(inducing)))
    return factor


def _identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


class InducingProcess:
    """Predictions like an `ExactProcess`'s, from `fit` or `restore`.

    Args:
        kernel: `make_kernel`'s, with its hyperparameters.
        points: ``m x d`` inducing points.
        gram: ``m x m``, G.
        moment: ``m``, b.
        data: the rows; none where it was restored.
    """

    # Any: gpytorch is untyped
    def __init__(
        self, kernel: Any, points: Tensor, gram: Tensor, moment: Tensor, data: Rows | None = None
    ) -> None:
        self._kernel = kernel.requires_grad_(False)
        self._inducing = as_rows(points)
        self._points = points
        self._gram = gram
        self._moment = moment
        self._data = data

    @classmethod
    @torch.no_grad()
    def fit(cls, kernel: Any, points: Tensor, data: Rows) -> InducingProcess:
        """Take the kernel over, set its scale, and learn u from the rows."""
        empty = points.new_zeros(0)
        process = cls(kernel, points, empty, empty, data)
        features = process._features(data.rows)
        weighed = features / data.noise
        process._gram = weighed @ features.mT
        process._moment = weighed @ data.targets
        kernel.outputscale = process._best_scale()
        return process

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> InducingProcess:
        """Rebuild a fitted process from `tensors`."""
        points = state["points"]
        kernel = make_kernel(points.shape[1])
        kernel.load_state_dict(named_under("kernel/", state))
        return cls(kernel, points, state["gram"], state["moment"])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything `restore` needs, by name."""
        return {
            **{f"kernel/{name}": value for name, value in self._kernel.state_dict().items()},
            "points": self._points,
            "gram": self._gram,
            "moment": self._moment,
        }

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the process at ``q x d`` points; differentiable."""
        cross = self._base.value_rows(points, self._inducing)  # (q, m)
        features = torch.linalg.solve_triangular(self._factor, cross.mT, upper=False)
        factor, weights = self._solved
        open_still = torch.linalg.solve_triangular(factor, features, upper=False)
        share = 1 - features.square().sum(0) + open_still.square().sum(0)
        return cross @ weights, (self._scale * share).clamp(min=1e-12).sqrt()

    def predict_mean(self, points: Tensor) -> Tensor:
        """Return the first of what `predict` does, for a fraction of its cost."""
        return self._base.value_rows(points, self._inducing) @ self._solved[1]

    def left_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, per value row, its error and variance without its evaluation, and its noise.

        With D the noise of an evaluation's rows B, e their errors and S the covariance of what is
        predicted for them, the errors without B are D (D - S)^-1 e and their covariance D (D -
        S)^-1 D, as in every linear model; to the value's own comes what u leaves open of it.

        Raises:
            SurrogateError: the process was restored, and its rows were not kept.
        """
        if self._data is None:
            raise SurrogateError("a restored process of inducing points has not kept its rows")
        data = self._data
        features = self._features(data.rows)
        factor, weights = self._solved
        open_still = torch.linalg.solve_triangular(factor, features, upper=False)
        missed = data.targets - features.mT @ (self._factor.mT @ weights)
        places, errors, variances = [], [], []
        for place, block, own in evaluations(data.rows):
            noise, part = data.noise[block].diag(), open_still[:, block]
            without = torch.linalg.inv(noise - self._scale * part.mT @ part)
            places.append(place)
            errors.append(noise[own, own] * (without[own] @ missed[block]))
            beyond = self._scale * (1 - features[:, place].square().sum())
            variances.append(noise[own, own].square() * without[own, own] + beyond)
        return torch.stack(errors), torch.stack(variances), data.noise[places]

    def _features(self, rows: Tensor) -> Tensor:
        return _features(self._base, self._points, rows, self._factor)

    def _best_scale(self) -> Tensor:
        told, directions = torch.linalg.eigh(self._gram)
        told = told.clamp(min=0.0)
        moments = (directions.mT @ self._moment).square()
        prior = self._kernel.outputscale_prior

        def loss(log_scale: float) -> float:
            scale = torch.tensor(log_scale, dtype=torch.float64).exp()
            spread = 1 + scale * told
            likelihood = 0.5 * (scale * moments / spread - spread.log()).sum()
            return -float(likelihood + prior.log_prob(scale))

        return torch.tensor(fit_scale(loss, float(self._scale)), dtype=torch.float64)

    @property
    def _scale(self) -> Tensor:
        scale: Tensor = self._kernel.outputscale.detach()
        return scale

    @property
    def _base(self) -> DirectionalMatern:
        base: DirectionalMatern = self._kernel.base_kernel
        return base

    @cached_property
    def _factor(self) -> Tensor:
        """L."""
        with torch.no_grad():
            return _factor_of(self._base, self._inducing)

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """The factor of I + s G, and what predictions weigh covariances with u by, ``m``."""
        with torch.no_grad():
            factor = psd_safe_cholesky(_identity(len(self._gram)) + self._scale * self._gram)
            told = torch.cholesky_solve(self._moment[:, None], factor)
            weights = torch.linalg.solve_triangular(self._factor.mT, told, upper=True)
        return factor, self._scale * weights[:, 0]
