"""The Gaussian process over value and derivative rows, exact: its hyperparameters and predictions.

What it does not know: mean functions, and which rows of which evaluations it is given. More rows
than can be factored are for `unicuco.surrogate.inducing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import gpytorch
import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError
from scipy.optimize import minimize_scalar
from torch import Tensor

from unicuco.surrogate.kernel import DirectionalMatern, is_value
from unicuco.tensors import named_under

_TYPICAL_LOG_SCALE: Final = -3.0  # log variance of what the mean leaves: a fifth of a log unit
_LEARNING_RATE: Final = 0.05
_LEAST_SCALE: Final = 0.02  # that fitting starts from
_MOST: Final = math.log(8)  # of a factor by which more rows may change the scale


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows with targets and noise variances."""

    rows: Tensor
    targets: Tensor
    noise: Tensor


def make_kernel(d: int) -> Any:
    """Return the kernel of ``d`` axes with its priors, at their centre; any scale."""
    # Lengthscales that grow with the root of d keep distances of order one (Hvarfner et al.,
    # arXiv 2402.02229).
    centre = 0.5 * math.log(d)
    base = DirectionalMatern(
        ard_num_dims=d, lengthscale_prior=gpytorch.priors.LogNormalPrior(centre, 0.3)
    )
    kernel = gpytorch.kernels.ScaleKernel(
        base, outputscale_prior=gpytorch.priors.LogNormalPrior(_TYPICAL_LOG_SCALE, 1.0)
    ).double()
    base.lengthscale = torch.full((1, d), math.exp(centre), dtype=torch.float64)
    return kernel


def kernel_for(data: Rows) -> Any:
    """Return `make_kernel`'s with a scale of the size of what there is to explain."""
    kernel = make_kernel((data.rows.shape[1] - 1) // 2)
    kernel.outputscale = data.targets[is_value(data.rows)].square().mean().clamp(min=_LEAST_SCALE)
    return kernel


def ascend(
    kernel: Any,  # gpytorch is untyped
    turns: Sequence[Rows],
    log_likelihood: Callable[[Rows], Tensor],
    rates: Sequence[float],
) -> None:
    """Fit hyperparameters a posteriori: a step of Adam per rate, each to the next part of the rows.

    Args:
        kernel: its parameters are moved.
        turns: the parts, in turns.
        log_likelihood: of one part, by the kernel.
        rates: of learning.

    Raises:
        NanError: a step led to where there is no likelihood.
    """
    optimizer = torch.optim.Adam(kernel.parameters())
    for step, rate in enumerate(rates):
        turn = turns[step % len(turns)]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        likelihood = log_likelihood(turn)
        if not likelihood.isfinite():
            raise NanError("the likelihood is no number any more")
        # A step sees a part of what is known, and so much of the priors.
        priors = sum(p.log_prob(of(m)).sum() for _, m, p, of, _ in kernel.named_priors())
        loss = -(likelihood + priors / len(turns)) / len(turn.targets)
        loss.backward()
        optimizer.step()


def fit_scale(loss: Callable[[float], float], start: float) -> float:
    """Return the scale near ``start`` whose logarithm has the least loss.

    Raises:
        NanError: ``start`` is no positive number.
    """
    if not 0 < start < math.inf:
        raise NanError(f"the scale became {start}")
    log = math.log(start)
    found = minimize_scalar(
        loss, bounds=(log - _MOST, log + _MOST), method="bounded", options={"xatol": 0.05}
    )
    return math.exp(found.x)


def evaluations(rows: Tensor) -> Iterator[tuple[int, Tensor, int]]:
    """Yield each value row's place, the places of its evaluation's rows, and its own among them.

    Rows of one point are one evaluation.
    """
    d = (rows.shape[1] - 1) // 2
    _, evaluation = torch.unique(rows[:, :d], dim=0, return_inverse=True)
    for place in is_value(rows).nonzero()[:, 0].tolist():
        block = (evaluation == evaluation[place]).nonzero()[:, 0]
        yield place, block, int((block == place).nonzero())


class ExactProcess(gpytorch.models.ExactGP):  # type: ignore[misc]  # gpytorch is untyped
    """All rows' covariance is factored: for as many as that takes a tenth of a second for."""

    def __init__(self, data: Rows) -> None:
        likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(data.noise)
        super().__init__(data.rows, data.targets, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel_for(data)
        self.double()

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> ExactProcess:
        """Rebuild a fitted process from `tensors`."""
        process = cls(Rows(state["rows"], state["targets"], state["noise"]))
        process.load_state_dict(named_under("process/", state), strict=False)
        process.freeze()
        return process

    def tensors(self) -> dict[str, Tensor]:
        """Return everything `restore` needs, by name."""
        return {
            **{f"process/{name}": value for name, value in self.state_dict().items()},
            "rows": self.train_inputs[0],
            "targets": self.train_targets,
            "noise": self.likelihood.noise,
        }

    def forward(self, rows: Tensor) -> Any:
        """Return the distribution of rows before anything was measured, as the library wants it."""
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(rows), self.covar_module(rows)
        )

    def tune(self, steps: int, turns: Sequence[Rows]) -> None:
        """Fit the hyperparameters, each step to one part of what is known after the other."""
        self.train()
        self.likelihood.train()

        def log_likelihood(turn: Rows) -> Tensor:
            self.set_train_data(turn.rows, turn.targets, strict=False)
            self.likelihood.noise = turn.noise
            with _exact():
                found: Tensor = self.likelihood(self(turn.rows)).log_prob(turn.targets)
            return found

        # Small steps from the priors' centre: line searches leap to lengthscales that explain the
        # noise of one axis, and the predictions are then wild.
        ascend(self.covar_module, turns, log_likelihood, [_LEARNING_RATE] * steps)

    def rescale(self) -> None:
        """Fit the scale alone to all rows: parts of them leave more unexplained, and so mislead.

        On its own it costs a factor per try, however many lengthscales there are.
        """
        rows, targets = self.train_inputs[0], self.train_targets
        with _exact(), torch.no_grad():
            shape = self.forward(rows).covariance_matrix / self._scale
        prior = self.covar_module.outputscale_prior

        def loss(log_scale: float) -> float:
            scale = torch.tensor(log_scale, dtype=torch.float64).exp()
            factor = psd_safe_cholesky(scale * shape + self.likelihood.noise.diag())
            solved = torch.linalg.solve_triangular(factor, targets[:, None], upper=False)
            likelihood = -0.5 * solved.square().sum() - factor.diagonal().log().sum()
            return -float(likelihood + prior.log_prob(scale))

        self.covar_module.outputscale = fit_scale(loss, float(self._scale))
        del self._scale

    def freeze(self) -> None:
        """Be done with fitting."""
        self.eval()
        self.likelihood.eval()
        self.requires_grad_(False)

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the process at ``q x d`` points; differentiable.

        The textbook formulas on a factor kept since the fit: training StratNet asks thousands of
        times, and the library's prediction strategies cost several times the arithmetic.
        """
        factor, weights = self._solved
        cross = self._scale * self._base.value_rows(points, self.train_inputs[0])  # (q, n)
        explained = torch.linalg.solve_triangular(factor, cross.mT, upper=False)
        variance = self._scale - explained.square().sum(0)
        return cross @ weights, variance.clamp(min=1e-12).sqrt()

    def predict_mean(self, points: Tensor) -> Tensor:
        """Return the first of what `predict` does, for a fraction of its cost."""
        _, weights = self._solved
        return self._scale * self._base.value_rows(points, self.train_inputs[0]) @ weights

    def left_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, per value row, its error and variance without its evaluation, and its noise.

        With P the inverse of the noisy covariance and B the rows of an evaluation, the error of B
        without itself is P_BB^-1 (P y)_B, and its covariance P_BB^-1 (Rasmussen and Williams 2006,
        section 5.4.2).
        """
        factor, weights = self._solved
        inverse = torch.cholesky_inverse(factor)
        places, errors, variances = [], [], []
        for place, block, own in evaluations(self.train_inputs[0]):
            covariance = torch.linalg.inv(inverse[block][:, block])
            places.append(place)
            errors.append(covariance[own] @ weights[block])
            variances.append(covariance[own, own])
        return torch.stack(errors), torch.stack(variances), self.likelihood.noise[places]

    @cached_property
    def _scale(self) -> Tensor:
        scale: Tensor = self.covar_module.outputscale.detach()
        return scale

    @property
    def _base(self) -> DirectionalMatern:
        base: DirectionalMatern = self.covar_module.base_kernel
        return base

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the noisy train covariance, and its inverse times the targets."""
        rows = self.train_inputs[0]
        with _exact(), torch.no_grad():
            prior = self.forward(rows).covariance_matrix + self.likelihood.noise.diag()
            factor = psd_safe_cholesky(prior)
        return factor, torch.cholesky_solve(self.train_targets[:, None], factor)[:, 0]


def _exact() -> Any:
    # Cholesky whatever the size; and train caches stay attached to nothing, so that predictions can
    # be differentiated.
    return gpytorch.settings.fast_computations(False, False, False)
