"""The mean function of the surrogate: log KL as a scaled sum of what the axes cost alone.

    m(u) = c + beta log(eps + sum_i exp(a_i + b_i (u_i - 1/2)) E_i(u_i))

E_i are the axis curves. With a = b = c = 0 and beta = 1 this is the Fisher prediction; the
parameters are fitted to measured values and derivatives under Gaussian priors around that, or
around what another run found (a maximum a posteriori estimate by L-BFGS). Every derivative along
every axis enters here, where it costs nothing; the Gaussian process then only has to explain what
is left over: how axes act together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
_GUIDED: Final = 0.5  # of these, around what another run learned of its model
_PRIOR_TRUST: Final = 0.5  # around 1
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
        trust: what another run's process is multiplied by (`Known`); 0 where there is none.
    """

    curves: AxisCurves
    scales: Tensor
    tilts: Tensor
    power: Tensor
    offset: Tensor
    trust: float = 0.0

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
        known: Known | None = None,
    ) -> CurveMean:
        """Fit the parameters.

        Args:
            curves: the axis curves.
            points: ``n x d`` unit points.
            values: ``n`` log (KL + EPSILON).
            derivatives: ``k x d`` derivatives of the values, or none; NaN where there is none.
            derivative_points: ``k x d`` unit points where they were measured.
            known: what another run knows; none: the prior is around the Fisher prediction.
        """
        d = len(curves.table)
        prior = _Gaussians.of(d, known)
        theta = prior.centre.clone().requires_grad_()
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
            total = ((theta - prior.centre) / prior.deviations).square().sum()
            left = values - mean._values(points, costs)
            if known is not None:
                left = left - theta[-1] * known.values
            total = total + (left / _VALUE_NOISE).square().sum()
            if derivatives is not None and noise is not None:
                left = derivatives - mean._gradients(there, there_costs, there_slopes)
                if known is not None:
                    left = left - theta[-1] * known.derivatives
                total = total + (left / noise).nan_to_num(0.0).square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        found = cls._from_vector(curves, theta.detach())
        return found if known is None else replace(found, trust=float(theta.detach()[-1]))

    def state(self) -> dict[str, Tensor]:
        """Return the parameters and curves as named tensors; `restore` reads them."""
        named = {
            "scales": self.scales,
            "tilts": self.tilts,
            "power": self.power,
            "offset": self.offset,
        }
        trust = torch.tensor(self.trust, dtype=torch.float64)
        return {**named, "curves": self.curves.table, "trust": trust}

    @classmethod
    def restore(cls, state: Mapping[str, Tensor]) -> CurveMean:
        """Rebuild a mean function from `state`."""
        return cls(
            curves=AxisCurves(state["curves"]),
            scales=state["scales"],
            tilts=state["tilts"],
            power=state["power"],
            offset=state["offset"],
            trust=float(state.get("trust", 0.0)),  # runs of before have none
        )

    @property
    def parameters(self) -> Tensor:
        """``2 d + 2``: a, b, beta - 1 and c; all are 0 at the Fisher prediction."""
        return torch.cat([self.scales, self.tilts, torch.stack([self.power - 1.0, self.offset])])

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What another run knows of a model.

    Attributes:
        centre: ``2 d + 2`` `parameters` of its mean function, carried over.
        values: ``n``, what its process adds to its mean function at the points of a fit.
        derivatives: ``k x d``, how that changes where derivatives were measured.
    """

    centre: Tensor
    values: Tensor
    derivatives: Tensor


@dataclass(frozen=True, slots=True)
class _Gaussians:
    """Independent Gaussians over the ``2 d + 2`` parameters, and trust where another run knows."""

    centre: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, d: int, known: Known | None) -> _Gaussians:
        deviations = torch.tensor(
            [_PRIOR_SCALE] * d + [_PRIOR_TILT] * d + [_PRIOR_POWER, _PRIOR_OFFSET],
            dtype=torch.float64,
        )
        if known is None:
            return cls(torch.zeros_like(deviations), deviations)
        trust = torch.tensor([_PRIOR_TRUST], dtype=torch.float64)
        return cls(
            torch.cat([known.centre, torch.ones_like(trust)]),
            torch.cat([_GUIDED * deviations, trust]),
        )
