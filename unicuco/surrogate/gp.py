"""The Gaussian process over log KL: values and a few directional derivatives each, in float64.

The target is y = log (KL + EPSILON); in unit coordinates its derivative is (high - low) dKL/ds /
(KL + EPSILON). A mean function (`CurveMean`, or a constant) takes what it can explain; the process
models the rest with a Matérn-5/2 ARD kernel (`DirectionalMatern`), one noise for values and one for
derivatives. What another run's surrogate knows may be a part of the mean function (`Prior`).

Which directions: all axes where there is room for them, else the uniform one and random ones. Exact
duplicates are merged; a fit that fails numerically falls back to the hyperparameters' priors before
it gives up.

The more evaluations, the fewer directions of each are looked at. Where not even one has room in
the exact process, which is the better one as long as it has, inducing points stand for them
(`InducingProcess`), and of very many evaluations only the newest are looked at, which lie where
answers come from. Hyperparameters are fitted to parts of them in turn. So a fit takes seconds,
however long a run gets.

What it does not know: budgets and requests. Predictions here are of the search text; intervals for
fresh text are calibrated elsewhere.

Notation: n evaluations, d axes, k directions per evaluation, q query points.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from unicuco.allocate.curves import AxisCurves
from unicuco.errors import SurrogateError
from unicuco.surrogate.inducing import InducingProcess, tuned_kernel
from unicuco.surrogate.kernel import as_rows
from unicuco.surrogate.mean import EPSILON, CurveMean, Known
from unicuco.surrogate.prior import Prior
from unicuco.surrogate.process import ExactProcess, Rows
from unicuco.tensors import named_under

_LOG = logging.getLogger(__name__)
# Of the noise of a derivative, as a share of the evaluation's typical one.
_DERIVATIVE_FLOOR: Final = 0.1
_MIN_VARIANCE: Final = 1e-6  # of a derivative of nothing, so that the covariance can be factored
_LARGEST_SCALE: Final = 30.0  # of the deviation: beyond, the fit is worth nothing anyway
_MAX_MEAN: Final = 1024  # evaluations that the mean function is fitted to


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateOptions:
    """How the surrogate is built.

    ``curves``: use the axis curves as the mean function (else a constant). ``directions``:
    directional derivatives per evaluation that enter the process (0: values only). ``steps``:
    iterations of the hyperparameter fit. ``value_noise`` and ``derivative_noise`` are standard
    deviations: an evaluation is exact on its text, so that of a value (of log KL) only stands for
    wrinkles that no smooth surface should follow; that of a rank-window derivative, a share of
    itself, for its own error (DESIGN.md section 8, finding 2). ``rows`` are those of an exact
    process at most, and ``tuning_rows`` those that its hyperparameters are fitted to at a time,
    which factors theirs ``steps`` times. Where the evaluations with one direction each are more
    than ``rows``, ``inducing_rows`` of them tell of ``inducing`` points, and hyperparameters are
    fitted to ``inducing_tuning_rows`` at a time by ``inducing_tuning`` points.
    """

    curves: bool = True
    directions: int = 8
    steps: int = 40
    value_noise: float = 0.03
    derivative_noise: float = 0.15
    rows: int = 1600
    tuning_rows: int = 320
    inducing: int = 600
    inducing_rows: int = 8000
    inducing_tuning: int = 150
    inducing_tuning_rows: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Measured values in unit coordinates.

    Attributes:
        points: ``n x d`` unit points.
        values: ``n`` log (KL + EPSILON).
        derivatives: ``n x d`` derivatives of the values; rows of NaN where none were measured, and
            columns of NaN along axes that have none.
    """

    points: Tensor
    values: Tensor
    derivatives: Tensor

    @classmethod
    def from_measurements(
        cls, points: Tensor, kl: Tensor, gradients: Sequence[Sequence[float] | None], span: Tensor
    ) -> Observations:
        """Take KL in nats and gradients to log values and unit derivatives; merge duplicates."""
        unknown = [float("nan")] * points.shape[1]
        rows = [list(gradient) if gradient is not None else unknown for gradient in gradients]
        raw = torch.tensor(rows, dtype=torch.float64).reshape(points.shape)
        kl = kl.double()
        derivatives = raw * span / (kl[:, None] + EPSILON)
        groups: dict[tuple[float, ...], list[int]] = {}
        for index, point in enumerate(points.tolist()):
            groups.setdefault(tuple(point), []).append(index)
        measured = ~torch.isnan(raw).all(1)
        # Of equal points, the one whose derivative was measured stands for all.
        chosen = [max(group, key=lambda k: (bool(measured[k]), -k)) for group in groups.values()]
        logs = (kl + EPSILON).log()
        means = [logs[group].mean() for group in groups.values()]
        return cls(
            points=points[chosen].double(),
            values=torch.stack(means) if means else logs,
            derivatives=derivatives[chosen],
        )

    def newest(self, count: int) -> Observations:
        """Return the last ``count`` of them, or all."""
        return self._at(slice(-count, None))

    def every(self, stride: int, start: int) -> Observations:
        """Return every ``stride``-th of them."""
        return self._at(slice(start, None, stride))

    def leaning_to_newest(self, count: int) -> Observations:
        """Return so many of them, or all: one half the newest, the other evenly spread in age."""
        count = min(count, len(self.points))
        older = len(self.points) - count // 2
        spread = torch.linspace(0, older - 1, count - count // 2).round().long()
        return self._at(torch.cat([spread, torch.arange(older, len(self.points))]))

    def _at(self, part: slice | Tensor) -> Observations:
        return Observations(
            points=self.points[part], values=self.values[part], derivatives=self.derivatives[part]
        )

    @property
    def measured(self) -> Tensor:
        """``n`` bool: which evaluations have derivatives."""
        return ~torch.isnan(self.derivatives).all(1)

    @property
    def axes(self) -> Tensor:
        """``d'`` axes along which there are derivatives."""
        return (~torch.isnan(self.derivatives)).any(0).nonzero()[:, 0]


class GaussianProcess:
    """The surrogate; ``fit`` then ask for ``posterior``.

    Args:
        options: how it is built.
        curves: the axis curves, needed when ``options.curves``.
        prior: what another run's surrogate says of the model; or none.
    """

    def __init__(
        self,
        options: SurrogateOptions,
        curves: AxisCurves | None = None,
        prior: Prior | None = None,
    ) -> None:
        if options.curves and curves is None:
            raise ValueError("a mean of curves needs the curves")
        self.options = options
        self.curves = curves
        self.prior = prior
        self._other = None if prior is None else GaussianProcess.restore(options, prior.other)
        self.mean_: CurveMean | None = None
        self._constant = 0.0
        self._model: ExactProcess | InducingProcess | None = None

    def fit(self, observations: Observations) -> None:
        """Fit mean function and hyperparameters.

        Raises:
            SurrogateError: fewer than two distinct evaluations, or no fit is numerically possible.
        """
        if len(observations.points) < 2:
            raise SurrogateError(
                "the surrogate needs at least two different evaluations that succeeded"
            )
        options = self.options
        use_derivatives = options.directions > 0 and bool(observations.measured.any())
        self._fit_mean(observations.newest(_MAX_MEAN), use_derivatives)
        most = options.directions if use_derivatives else 0
        is_small = len(observations.points) * (2 if most else 1) <= options.rows
        for steps in (options.steps, 0):
            try:
                if is_small:
                    self._model = self._exact(observations, most, steps)
                else:
                    self._model = self._inducing(observations, most, steps)
                self.posterior(observations.points[:1])
            except (NotPSDError, NanError, RuntimeError) as error:
                _LOG.warning("surrogate fit with %d steps failed (%s)", steps, error)
            else:
                return
        raise SurrogateError(
            "the surrogate can't be fitted to these evaluations, even at its prior"
        )

    def posterior(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of log (KL + EPSILON), ``q`` each, at ``q x d`` points.

        Both are differentiable. The deviation is that of the function itself, without measurement
        noise.
        """
        if self._model is None:
            raise SurrogateError("the surrogate has not been fitted")
        points = points.double()
        mean, std = self._model.predict(points)
        return self._explained(points) + mean, std

    def beyond_mean(self, points: Tensor) -> Tensor:
        """Return ``q``: how far `posterior` is from the mean function; differentiable."""
        if self._model is None:
            raise SurrogateError("the surrogate has not been fitted")
        return self._model.predict_mean(points) + self._trust * self._other_values(points)

    def deviation_scale(self) -> float:
        """Return what makes the deviation fit its leave-one-out errors best, as a factor.

        One evaluation with all its derivatives is left out at a time (the mean function and the
        hyperparameters have seen it). At least 1.

        Raises:
            SurrogateError: not fitted, or restored and by inducing points: its rows are not kept.
        """
        if self._model is None:
            raise SurrogateError("the surrogate has not been fitted")
        errors, variances, noise = self._model.left_out()
        scales = torch.logspace(0, math.log10(_LARGEST_SCALE), 60, dtype=torch.float64)
        own = (variances - noise).clamp(min=0.0)
        spread = scales[:, None].square() * own + noise
        likelihood = -0.5 * (errors.square() / spread + spread.log()).sum(1)
        return float(scales[int(likelihood.argmax())])

    def state(self) -> dict[str, Tensor]:
        """Return everything `restore` needs, as named tensors."""
        if self._model is None:
            raise SurrogateError("the surrogate has not been fitted")
        tensors = self._model.tensors()
        tensors["constant"] = torch.tensor(self._constant, dtype=torch.float64)
        if self.mean_ is not None:
            tensors |= {f"mean/{name}": value for name, value in self.mean_.state().items()}
        if self.prior is not None:
            tensors |= {f"prior/{name}": value for name, value in self.prior.state().items()}
        return {name: value.detach().clone().contiguous() for name, value in tensors.items()}

    @classmethod
    def restore(cls, options: SurrogateOptions, state: Mapping[str, Tensor]) -> GaussianProcess:
        """Rebuild a fitted surrogate from `state`, without fitting."""
        mean, prior = (named_under(part, state) for part in ("mean/", "prior/"))
        surrogate = cls(
            options,
            AxisCurves(mean["curves"]) if mean else None,
            Prior.restore(prior) if prior else None,
        )
        surrogate.mean_ = CurveMean.restore(mean) if mean else None
        surrogate._constant = float(state["constant"])
        process = InducingProcess if "points" in state else ExactProcess
        surrogate._model = process.restore(state)
        return surrogate

    def _exact(self, observations: Observations, most: int, steps: int) -> ExactProcess:
        d = observations.points.shape[1]
        known, many = _within(observations, self.options.rows, most and d)
        turns = self._turns(known, self.options.tuning_rows, most)
        tuned = ExactProcess(turns[-1])
        tuned.tune(steps, turns)
        exact = ExactProcess(self._rows(known, many))
        exact.load_state_dict(tuned.state_dict(), strict=False)
        exact.freeze()
        if steps and len(turns) > 1:
            exact.rescale()
        return exact

    def _inducing(self, observations: Observations, most: int, steps: int) -> InducingProcess:
        options = self.options
        d = observations.points.shape[1]
        known, many = _within(observations, options.inducing_rows, most and d)
        # Values tell most, and with one derivative each most of them have room.
        turns = self._turns(known, options.inducing_tuning_rows, min(most, 1))
        return InducingProcess.fit(
            tuned_kernel(turns, steps, options.inducing_tuning),
            known.leaning_to_newest(options.inducing).points,
            self._rows(known, many),
        )

    def _fit_mean(self, observations: Observations, use_derivatives: bool) -> None:
        self._constant = float(observations.values.mean())
        if self.curves is None or not self.options.curves:
            return
        measured = observations.measured
        derivatives = observations.derivatives[measured] if use_derivatives else None
        known = None
        if self.prior is not None:
            values, slopes = self._told(observations.points)
            known = Known(centre=self.prior.centre, values=values, derivatives=slopes[measured])
        self.mean_ = CurveMean.fit(
            self.curves,
            observations.points,
            observations.values,
            derivatives,
            observations.points[measured],
            known,
        )

    def _told(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return what another run's process says at ``n x d`` points, ``n``, and its gradients."""
        leaf = points.detach().requires_grad_()
        values = self._other_values(leaf)
        (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    def _other_values(self, points: Tensor) -> Tensor:
        if self.prior is None or self._other is None:
            return points.new_zeros(len(points))
        return self._other.beyond_mean(points @ self.prior.places)

    @property
    def _trust(self) -> float:
        return 0.0 if self.mean_ is None else self.mean_.trust

    def _explained(self, points: Tensor) -> Tensor:
        """Return ``n``: what is left to the process is measured from here."""
        return self._mean_values(points) + self._trust * self._other_values(points)

    def _explained_slopes(self, points: Tensor) -> Tensor:
        """Return the ``n x d`` derivatives of `_explained`."""
        slopes = torch.zeros_like(points) if self.mean_ is None else self.mean_.gradients(points)
        return slopes if self.prior is None else slopes + self._trust * self._told(points)[1]

    def _mean_values(self, points: Tensor) -> Tensor:
        if self.mean_ is None:
            return torch.full(points.shape[:1], self._constant, dtype=torch.float64)
        return self.mean_.values(points)

    def _turns(self, observations: Observations, rows: int, directions: int) -> list[Rows]:
        """Divide evaluations into parts of so many rows, alike in age."""
        _, each = _within(observations, rows, directions)
        num_turns = -(-len(observations.points) // max(1, rows // (each + 1)))
        return [self._rows(observations.every(num_turns, turn), each) for turn in range(num_turns)]

    def _rows(self, observations: Observations, count: int) -> Rows:
        """Return value rows, and derivative rows along ``count`` directions per evaluation."""
        values = observations.values - self._explained(observations.points)
        rows, targets = [as_rows(observations.points)], [values]
        noise = [torch.full_like(values, self.options.value_noise)]
        if count:
            points = observations.points[observations.measured]
            axes = observations.axes
            whole = observations.derivatives[observations.measured][:, axes]
            left_over = whole - self._explained_slopes(points)[:, axes]
            typical = whole.square().mean(1, keepdim=True).sqrt()
            share = self.options.derivative_noise
            spread = share * whole.abs() + _DERIVATIVE_FLOOR * typical  # (n, d')
            for direction in _directions(len(whole), len(axes), count):
                within = torch.zeros_like(points).index_copy(1, axes, direction)
                rows.append(as_rows(points, within))
                targets.append((left_over * direction).sum(-1))
                noise.append((spread * direction).norm(dim=-1))
        variance = torch.cat(noise).square().clamp(min=_MIN_VARIANCE)
        return Rows(torch.cat(rows), torch.cat(targets), variance)


def _within(observations: Observations, rows: int, directions: int) -> tuple[Observations, int]:
    """Return the newest evaluations that so many rows have room for, and directions of each.

    Of many evaluations more with few directions each tell more than few with many
    (`python -m benchmarks.refit`): one direction, where there are any, is the least.
    """
    each = min(directions, max(1, rows // len(observations.points) - 1))
    return observations.newest(rows // (each + 1)), each


def _directions(n: int, d: int, count: int) -> list[Tensor]:
    """Return ``count`` orthonormal directions for each of n evaluations, ``n x d`` each.

    All axes if there is room for them; else the uniform direction and random ones, drawn anew for
    every evaluation. They never depend on what was measured: a direction chosen by size would show
    noise as signal.
    """
    if count >= d:
        return [row.expand(n, d) for row in torch.eye(d, dtype=torch.float64)]
    generator = torch.Generator().manual_seed(d)
    draws = torch.randn(n, d, count, generator=generator, dtype=torch.float64)
    draws[:, :, 0] = 1.0
    return list(torch.linalg.qr(draws).Q.unbind(-1))
