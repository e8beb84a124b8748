"""From what the surrogate believes of the search text to a 95% interval for fresh text.

After learning, StratNet's answers to targets along the front are measured on the validation text,
which nothing was fitted to. Their log residuals show where along the front the surrogate errs, and
it errs smoothly: a Gaussian process over the predicted log KL (a constant and a squared
exponential; amplitude, length and nugget are averages over a grid, by evidence) says how much to
correct, and how sure that is. Its nugget is by how much single strategies differ from their
neighbours. How much a strategy's KL varies from window to window of the validation text says how
much it varies between texts of that length: texts are hard or easy, and not for all strategies
alike.

A strategy that StratNet would not answer is less certain. The surrogate's own deviation says so,
but too small; it is multiplied by what its leave-one-out errors ask for, and counts in as far as it
exceeds what it is on the front, where the correction was measured. And the further a strategy lies
above the front of its size, by what the surrogate says, the less it is like those that were
corrected: the surrogate is too hopeful by a share of that excess, and unsure by another. Both are
what one-shot allocators (uniform, Fisher) measured on the same text makes of a prior.

The surrogate knows no ceiling, but a model that knows nothing, and says so, is off by log V - H
only (V words, the dense model's entropy H), and few are worse. All of the above is said of a KL k
without a ceiling, and K, which is foretold, bends below one: K = (k^-4 + C^-4)^(-1/4). The power is
what random strategies of the reference model show. What was measured the surrogate knows already,
bent or not, and a model that is sure of what is wrong is worse than one that knows nothing; so C is
log V - H or well above all that was measured, whichever is more. Where the ceiling lies is itself
not sure, so deviations are not bent.

Student's t accounts for how few strategies were measured. What this does not know: whether a fresh
text really is of that kind.

Notation: n measured strategies of w windows, q predictions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from unicuco.surrogate.mean import EPSILON
from unicuco.types import Prediction

# Of log KL. The constant is what texts and the surrogate may differ by as a whole.
_CONSTANT: Final = 0.3
_AMPLITUDES: Final = (0.01, 0.03, 0.1, 0.3, 1.0)
_LENGTHS: Final = (0.5, 1.0, 2.0, 4.0)  # nats of log KL: a front spans about seven
_NUGGETS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
# Shares of the excess over the front, by which single strategies differ from each other.
_EXCESSES: Final = np.geomspace(0.01, 0.5, 18)
_EXCESS_PRIOR: Final = (math.log(0.05), 0.5)  # mean and deviation of the share's logarithm
_BIAS_PRIOR: Final = 0.1  # deviation of the share that all have in common, around none
_BEND: Final = 4.0
_REACHED: Final = 0.7  # of the ceiling at most by what was measured, which so bends by 7%

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Strategies measured on the validation text, and what the surrogate says of them.

    Attributes:
        window_kl: ``n x w`` KL of n strategies on each of w windows, nats per token.
        mean: ``n`` log (KL + EPSILON), the surrogate's.
        std: ``n`` its deviations.
        sizes: ``n`` what the strategies keep, in the space's measure of size.
    """

    window_kl: Tensor
    mean: Tensor
    std: Tensor
    sizes: Tensor

    @property
    def log_kl(self) -> Tensor:
        """``n`` log (KL + EPSILON) as measured."""
        return (self.window_kl.double().mean(1) + EPSILON).log()


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """A calibration of the surrogate's predictions, in log KL.

    Attributes:
        means: the surrogate's of the ``n`` measured strategies, rising.
        residuals: ``n``, measured minus predicted.
        deviations: ``n``, the surrogate's own.
        sizes: ``n``, what the strategies keep; none, as in older runs: excess is not looked at.
        amplitude, length, nugget: of the correction; deviations, and nats of log KL.
        text_variance: of how a strategy differs between two texts as long as the measured one.
        deviation_scale: what the surrogate's deviation is multiplied by, >= 1.
        excess_bias: the share of the excess over the front by which means are too low.
        excess_scale: the share of it that counts as deviation.
        ceiling: that KL bends below, nats per token; none, as in older runs: there is none.
        degrees: of freedom behind all of it, >= 1.
    """

    means: tuple[float, ...]
    residuals: tuple[float, ...]
    deviations: tuple[float, ...]
    amplitude: float
    length: float
    nugget: float
    text_variance: float
    deviation_scale: float
    degrees: int
    sizes: tuple[float, ...] = ()
    excess_scale: float = 0.0
    excess_bias: float = 0.0
    ceiling: float | None = None

    def __post_init__(self) -> None:
        n = len(self.means)
        if n < 2 or len(self.residuals) != n or len(self.deviations) != n:
            raise ValueError(f"{n} means need as many residuals and deviations, two at least")
        if len(self.sizes) not in (0, n):
            raise ValueError(f"{n} means need as many sizes, or none, got {len(self.sizes)}")
        if self.ceiling is not None and not self.ceiling > 0:
            raise ValueError(f"a ceiling is above 0 nats, got {self.ceiling}")

    @classmethod
    def calibrate(
        cls,
        front: Measured,
        others: Measured | None = None,
        *,
        deviation_scale: float = 1.0,
        ceiling: float | None = None,
    ) -> Intervals:
        """Calibrate on validation measurements.

        Args:
            front: two strategies of StratNet's or more, each once.
            others: strategies off the front; none: the shares of the excess are the prior's.
            deviation_scale: see the class; `GaussianProcess.deviation_scale`.
            ceiling: `DenseReference.kl_of_uniform`, nats per token; lifted where what was measured
                comes near it. None: there is none.
        """
        if ceiling is not None:
            told = [front.log_kl, *([] if others is None else [others.log_kl])]
            ceiling = max(ceiling, float(torch.cat(told).max().exp()) / _REACHED)
        n, w = front.window_kl.shape
        order = front.mean.argsort()
        # How hard each window is for each strategy, on average 1; a text is the mean of w windows.
        window_kl = front.window_kl.double()
        hardness = window_kl / (window_kl.mean(1, keepdim=True) + EPSILON)
        text_variance = 2 * float(hardness.var(1).mean()) / w if w > 1 else 0.0
        means = front.mean[order].double().numpy()
        residuals = (_unbent(front.log_kl, ceiling) - front.mean)[order].numpy()
        amplitude, length, nugget = _shape(means, residuals)
        found = cls(
            means=tuple(means.tolist()),
            residuals=tuple(residuals.tolist()),
            deviations=tuple(front.std[order].double().tolist()),
            sizes=tuple(front.sizes[order].double().tolist()),
            amplitude=amplitude,
            length=length,
            nugget=nugget,
            text_variance=text_variance,
            deviation_scale=max(1.0, deviation_scale),
            degrees=n - 1,
            ceiling=ceiling,
        )
        bias, scale = found._fitting_shares(others)
        return replace(found, excess_bias=bias, excess_scale=scale)

    @classmethod
    def restore(cls, document: Mapping[str, Any]) -> Intervals:
        """Return what `dataclasses.asdict` made of one, also after JSON.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        fields = {"sizes": (), **document}  # runs of before have no sizes
        for name in ("means", "residuals", "deviations", "sizes"):
            fields[name] = tuple(map(float, fields[name]))
        return cls(**fields)

    def predict(self, mean: Tensor, std: Tensor, sizes: Tensor) -> list[Prediction]:
        """Return predictions for ``q`` means and deviations of log (KL + EPSILON), and sizes."""
        return predictions(*self.corrected(mean, std, sizes), degrees=self.degrees)

    def corrected(self, mean: Tensor, std: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return centre and variance, ``q`` each, of the log (KL + EPSILON) of a fresh text."""
        centre, variance = self._without_ceiling(mean, std, sizes)
        if self.ceiling is not None:
            highest = torch.tensor(-_BEND * math.log(self.ceiling), dtype=torch.float64)
            centre = torch.logaddexp(-_BEND * centre, highest) / -_BEND
        return centre, variance

    def _without_ceiling(self, mean: Tensor, std: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return centre and variance as if KL had no ceiling."""
        x = mean.double().numpy()
        cross = _covariance(x, np.array(self.means), self.amplitude, self.length)  # (q, n)
        factor, weights = self._solved
        explained = np.linalg.solve(factor, cross.T)
        unsure = _CONSTANT**2 + self.amplitude**2 - np.square(explained).sum(0)
        right = np.searchsorted(self.means, x).clip(1, len(self.means) - 1)
        known = np.array(self.deviations)
        on_front = np.maximum(known[right - 1], known[right])  # of the neighbours on the front
        beyond = np.square(std.double().numpy()) - np.square(on_front)
        excess = self._excess(x, sizes.double().numpy())
        variance = (
            unsure.clip(min=0.0)
            + self.nugget**2
            + self.text_variance
            + self.deviation_scale**2 * beyond.clip(min=0.0)
            + np.square(self.excess_scale * excess)
        )
        centre = x + cross @ weights + self.excess_bias * excess
        return torch.from_numpy(centre), torch.from_numpy(variance)

    def _excess(self, means: Floats, sizes: Floats) -> Floats:
        """Return by how much ``q`` means lie above the front's at the same sizes, or zero."""
        if not self.sizes:
            return np.zeros_like(means)
        order = np.argsort(self.sizes)
        front = np.interp(sizes, np.array(self.sizes)[order], np.array(self.means)[order])
        return np.asarray(means - front, dtype=np.float64).clip(min=0.0)

    def _fitting_shares(self, others: Measured | None) -> tuple[float, float]:
        """Return bias and scale of the excess, a posteriori, by what was measured off the front.

        An error is the bias times the excess and noise, of which a share of the excess is a part.
        Given that share the bias is a linear model's (Bishop 2006, section 3.3). Both are averaged
        over a grid of shares, even in logarithms; how unsure the bias is left counts as share.
        """
        errors = known = excess = np.zeros(0)
        if others is not None:
            middle, variance = self._without_ceiling(others.mean, others.std, others.sizes)
            errors = (_unbent(others.log_kl, self.ceiling) - middle).numpy()
            known = variance.numpy()
            excess = self._excess(others.mean.double().numpy(), others.sizes.double().numpy())
        centre, spread = _EXCESS_PRIOR
        noise = known + np.square(_EXCESSES[:, None] * excess)  # (shares, others)
        precision = 1 / _BIAS_PRIOR**2 + (np.square(excess) / noise).sum(1)
        biases = (excess * errors / noise).sum(1) / precision
        misfit = (np.square(errors) / noise).sum(1) - precision * np.square(biases)
        evidence = -0.5 * (misfit + np.log(noise).sum(1) + np.log(precision))
        evidence -= 0.5 * np.square((np.log(_EXCESSES) - centre) / spread)
        likely = _normalised(evidence)
        bias = float(likely @ biases)
        spreads = np.square(_EXCESSES) + 1 / precision + np.square(biases - bias)
        return bias, math.sqrt(float(likely @ spreads))

    @cached_property
    def _solved(self) -> tuple[Floats, Floats]:
        """The Cholesky factor of the residuals' covariance, and its inverse times them."""
        return _solve(
            np.array(self.means), np.array(self.residuals), self.amplitude, self.length, self.nugget
        )


def predictions(centre: Tensor, variance: Tensor, *, degrees: int) -> list[Prediction]:
    """Return predictions with intervals of Student's t around ``q`` log (KL + EPSILON)."""
    reach = float(stats.t.ppf(0.975, degrees)) * variance.sqrt()
    low, middle, high = (
        (x.exp() - EPSILON).clamp(min=0) for x in (centre - reach, centre, centre + reach)
    )
    rows = torch.stack([low, middle, high], dim=-1).tolist()
    return [Prediction(mean=m, lo95=lo, hi95=hi) for lo, m, hi in rows]


def _covariance(x: Floats, y: Floats, amplitude: float, length: float) -> Floats:
    """Return the ``q x n`` covariance of the correction at two sets of predicted log KL."""
    apart = (x[:, None] - y[None, :]) / length
    kernel: Floats = _CONSTANT**2 + amplitude**2 * np.exp(-0.5 * np.square(apart))
    return kernel


def _solve(
    x: Floats, residuals: Floats, amplitude: float, length: float, nugget: float
) -> tuple[Floats, Floats]:
    covariance = _covariance(x, x, amplitude, length) + nugget**2 * np.eye(len(x))
    factor: Floats = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
    weights: Floats = np.linalg.solve(factor.T, np.linalg.solve(factor, residuals))
    return factor, weights


def _shape(x: Floats, residuals: Floats) -> tuple[float, float, float]:
    """Return amplitude, length and nugget: means of their logarithms a posteriori.

    A priori all of the grid are alike. The best of them would jump by a factor of two where so few
    residuals leave two nearly as likely.
    """
    grid = np.array(list(itertools.product(_AMPLITUDES, _LENGTHS, _NUGGETS)))
    likely = _normalised(np.array([_log_evidence(x, residuals, *shape) for shape in grid]))
    amplitude, length, nugget = np.exp(likely @ np.log(grid)).tolist()
    return amplitude, length, nugget


def _normalised(evidence: Floats) -> Floats:
    """Return probabilities from their logarithms but for a constant."""
    likely = np.exp(evidence - evidence.max())
    normal: Floats = likely / likely.sum()
    return normal


def _unbent(log_kl: Tensor, ceiling: float | None) -> Tensor:
    """Return what the logarithms would be without a ceiling."""
    if ceiling is None:
        return log_kl
    return log_kl - torch.log1p(-((log_kl.exp() / ceiling) ** _BEND)) / _BEND


def _log_evidence(
    x: Floats, residuals: Floats, amplitude: float, length: float, nugget: float
) -> float:
    factor, weights = _solve(x, residuals, amplitude, length, nugget)
    return float(-0.5 * residuals @ weights - np.log(np.diag(factor)).sum())
