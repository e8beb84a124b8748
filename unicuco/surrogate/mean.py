"""The mean function of the surrogate: log KL as a scaled sum of what the axes cost alone.

    m(u) = c + beta log(eps + sum_i exp(a_i + b_i (u_i - 1/2)) E_i(u_i))

E_i are the axis curves. With a = b = c = 0 and beta = 1 this is the Fisher prediction; the
parameters are fitted to measured values and derivatives under Gaussian priors around that (a
maximum a posteriori estimate by L-BFGS). Every derivative along every axis enters here, where it
costs nothing; the Gaussian process then only has to explain what is left over: how axes act
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.curves import AxisCurves

# Standard deviations of the priors: an axis may cost exp(0.7) times what its curve says and still
# be no surprise.
_PRIOR_SCALE: Final = 0.7
_PRIOR_TILT: Final = 0.7
_PRIOR_POWER: Final = 0.5
_PRIOR_OFFSET: Final = 0.5
_VALUE_NOISE: Final = 0.02  # log KL
# Of the root mean square derivative of the same evaluation. Large, since what the sum of curves
# gets wrong it gets wrong for many derivatives at once, and they would outvote the values.
_DERIVATIVE_NOISE_FRACTION: Final = 1.0
EPSILON: Final = 1e-4  # nats per token, added to every KL before its logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveMean:
    """A fitted mean function.

    Attributes:
        curves: one per axis.
        scales: ``d`` log factors a.
        tilts: ``d`` tilts b.
        power: beta.
        offset: c.
    """

    curves: AxisCurves
    scales: Tensor
    tilts: Tensor
    power: Tensor
    offset: Tensor

    @classmethod
    def prior(cls, curves: AxisCurves) -> CurveMean:
        """Return the Fisher prediction itself."""
        d = len(curves.table)
        zeros = torch.zeros(d, dtype=torch.float64)
        one = torch.ones((), dtype=torch.float64)
        return cls(
            curves=curves,
            scales=zeros,
            tilts=zeros.clone(),
            power=one,
            offset=torch.zeros_like(one),
        )

    @classmethod
    def fit(
        cls,
        curves: AxisCurves,
        points: Tensor,
        values: Tensor,
        derivatives: Tensor | None = None,
        derivative_points: Tensor | None = None,
    ) -> CurveMean:
        """Fit the parameters.

        Args:
            curves: the axis curves.
            points: ``n x d`` unit points.
            values: ``n`` log (KL + EPSILON).
            derivatives: ``k x d`` derivatives of the values, or none; NaN where there is none.
            derivative_points: ``k x d`` unit points where they were measured.
        """
        d = len(curves.table)
        theta = torch.zeros(2 * d + 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=80, history_size=20, line_search_fn="strong_wolfe"
        )
        noise = None
        if derivatives is not None:
            noise = _DERIVATIVE_NOISE_FRACTION * derivatives.square().nanmean(
                1, keepdim=True
            ).sqrt().clamp(min=1e-3)

        # What the curves say does not change with the parameters.
        costs = curves.values(points)
        there = points[:0] if derivative_points is None else derivative_points
        there_costs, there_slopes = curves.values(there), curves.slopes(there)

        def loss() -> Tensor:
            optimizer.zero_grad()
            mean = cls._from_vector(curves, theta)
            total = _log_prior(theta, d)
            total = total + ((values - mean._values(points, costs)) / _VALUE_NOISE).square().sum()
            if derivatives is not None and noise is not None:
                left = (derivatives - mean._gradients(there, there_costs, there_slopes)) / noise
                total = total + left.nan_to_num(0.0).square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        return cls._from_vector(curves, theta.detach())

    def state(self) -> dict[str, Tensor]:
        """Return the parameters and curves as named tensors; `restore` reads them."""
        named = {
            "scales": self.scales,
            "tilts": self.tilts,
            "power": self.power,
            "offset": self.offset,
        }
        return {**named, "curves": self.curves.table}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> CurveMean:
        """Rebuild a mean function from `state`."""
        return cls(
            curves=AxisCurves(state["curves"]),
            scales=state["scales"],
            tilts=state["tilts"],
            power=state["power"],
            offset=state["offset"],
        )

    @classmethod
    def _from_vector(cls, curves: AxisCurves, theta: Tensor) -> CurveMean:
        d = len(curves.table)
        return cls(
            curves=curves,
            scales=theta[:d],
            tilts=theta[d : 2 * d],
            power=1.0 + theta[2 * d],
            offset=theta[2 * d + 1],
        )

    def values(self, points: Tensor) -> Tensor:
        """Return ``b`` means of log (KL + EPSILON) at ``b x d`` unit points."""
        return self._values(points, self.curves.values(points))

    def gradients(self, points: Tensor) -> Tensor:
        """Return the ``b x d`` derivatives of `values`."""
        return self._gradients(points, self.curves.values(points), self.curves.slopes(points))

    def _values(self, points: Tensor, costs: Tensor) -> Tensor:
        terms = self._factors(points) * costs
        return self.offset + self.power * torch.log(EPSILON + terms.sum(-1))

    def _gradients(self, points: Tensor, costs: Tensor, slopes: Tensor) -> Tensor:
        factors = self._factors(points)
        terms = factors * costs
        changes = factors * slopes + self.tilts * terms
        return self.power * changes / (EPSILON + terms.sum(-1, keepdim=True))

    def _factors(self, points: Tensor) -> Tensor:
        return torch.exp(self.scales + self.tilts * (points - 0.5))


def _log_prior(theta: Tensor, d: int) -> Tensor:
    return (
        (theta[:d] / _PRIOR_SCALE).square().sum()
        + (theta[d : 2 * d] / _PRIOR_TILT).square().sum()
        + (theta[2 * d] / _PRIOR_POWER).square()
        + (theta[2 * d + 1] / _PRIOR_OFFSET).square()
    )
