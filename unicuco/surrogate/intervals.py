"""From what the surrogate believes of the search text to a 95% interval for fresh text.

After learning, some strategies are measured on the validation text, which nothing was fitted to.
Their log residuals give a bias and a spread; how much the KL varies from window to window of that
text says how much a text of the same length varies as a whole. All of it, and the surrogate's own
deviation at the point, add up to the variance of one fresh measurement, and Student's t accounts
for how few strategies were measured.

What it does not know: whether a fresh text really is of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from unicuco.surrogate.mean import EPSILON
from unicuco.types import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """A calibration of the surrogate's predictions, in log KL.

    ``bias`` is what is added to the mean; ``variance`` that of one fresh measurement around it, the
    surrogate's own not included; ``degrees`` those of freedom behind them.
    """

    bias: float
    variance: float
    degrees: int

    @classmethod
    def calibrate(cls, window_kl: Tensor, mean: Tensor) -> Intervals:
        """Calibrate on validation measurements.

        Args:
            window_kl: ``n x w`` KL of n >= 3 strategies on each of w windows, nats per token.
            mean: ``n`` the surrogate's mean log (KL + EPSILON) of the same strategies.
        """
        n, w = window_kl.shape
        kl = window_kl.mean(1)
        residuals = (kl + EPSILON).log() - mean
        relative = (window_kl / kl[:, None].clamp(min=EPSILON)).mean(
            0
        )  # how hard each window is, on average 1
        text_variance = float(relative.var()) / w if w > 1 else 0.0
        # Twice: the validation text is one such draw, and so is the fresh one.
        variance = float(residuals.var()) * (1 + 1 / n) + 2 * text_variance
        return cls(bias=float(residuals.mean()), variance=variance, degrees=n - 1)

    def predict(self, mean: Tensor, std: Tensor) -> list[Prediction]:
        """Return the predictions for ``q`` means and deviations of log (KL + EPSILON)."""
        centre = mean + self.bias
        reach = float(stats.t.ppf(0.975, self.degrees)) * (self.variance + std.square()).sqrt()
        low, middle, high = (
            (x.exp() - EPSILON).clamp(min=0) for x in (centre - reach, centre, centre + reach)
        )
        rows = torch.stack([low, middle, high], dim=-1).tolist()
        return [Prediction(mean=m, lo95=lo, hi95=hi) for lo, m, hi in rows]
