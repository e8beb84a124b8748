"""`LatencyRequests`: ``max_latency_ms`` along a run's front, and what plans say of latency.

The answer is the first strategy of the front, from large to small, whose predicted time per token
is within the bound: so it is never over it, and a lower bound never keeps more. The front trades
quality for size, not for time: where attention and MLP differ in time per parameter, a strategy of
equal time and better quality may exist.

What it does not know: how the front was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from unicuco.errors import InfeasibleRequestError
from unicuco.objectives import LatencyModel, dense_features, latency_features
from unicuco.space import CostModel
from unicuco.types import PredictedLatency, Request, ServedAs, Strategy

_DIGITS: Final = 4
_NOT_PREDICTED: Final = {
    ServedAs.MASK: "masks, which are as fast as the dense model",
    ServedAs.QUANTISED: "fewer bits, whose latency is not predicted",
}


class LatencyRequests:
    """Answers for one run.

    Args:
        model: measured on some machine.
        cost: of the run's space.
    """

    def __init__(self, model: LatencyModel, cost: CostModel) -> None:
        self._model = model
        self._cost = cost
        self._dense = dense_features(cost)

    def features(self, strategies: Sequence[Strategy]) -> Tensor:
        """Return the ``n x f`` features that `first_within` reads."""
        return latency_features(self._cost, strategies)

    def forecast(self, request: Request, strategy: Strategy) -> PredictedLatency:
        """Return a strategy's latency at the request's batch, or at the smallest measured one."""
        batch = self._batch(request)
        (ms,) = self._model.predict(self.features([strategy]), batch).tolist()
        return PredictedLatency(batch=batch, ms=ms, dense_ms=self._dense_ms(batch))

    def first_within(self, request: Request, features: Tensor) -> int | None:
        """Return the place of the first strategy within the bound; none: the dense model is.

        Args:
            request: of max_latency_ms.
            features: ``n x f`` of the front, from large to small.

        Raises:
            InfeasibleRequestError: none is, or the batch lies outside what was measured.
        """
        batch = self._batch(request)
        if self._dense_ms(batch) <= request.value:
            return None
        ms = self._model.predict(features, batch)
        fits = (ms <= request.value).nonzero()[:, 0]
        if len(fits):
            return int(fits[0])
        least = _rounded_up(float(ms.min()))
        raise InfeasibleRequestError(
            f"max_latency_ms {request.value:g} can't be met: the smallest variant of this run "
            f"takes {least:g} ms per token at batch {batch}",
            nearest=least,
        )

    def _batch(self, request: Request) -> int:
        batches = self._model.batches
        batch = request.batch or batches[0]
        if self._model.covers(batch):
            return batch
        raise InfeasibleRequestError(
            f"batch {batch} lies outside what was measured, {batches[0]} to {batches[-1]}; "
            "measure others with: unicuco latency RUN --batches",
            nearest=float(min(max(batch, batches[0]), batches[-1])),
        )

    def _dense_ms(self, batch: int) -> float:
        return float(self._model.predict(self._dense, batch))


def no_latency_model(served_as: ServedAs) -> InfeasibleRequestError:
    """Return the error of a run that can't answer ``max_latency_ms``; it says what to do."""
    if served_as is ServedAs.SHRINK:
        return InfeasibleRequestError(
            "this run has no latency model yet; measure one on this machine with: "
            "unicuco latency RUN"
        )
    return InfeasibleRequestError(
        f"this run learned {_NOT_PREDICTED[served_as]}; learn one with --dimensions depth,width"
    )


def _rounded_up(ms: float) -> float:
    """Round to few digits, so that what is named can be typed, and met."""
    unit = 10.0 ** (math.floor(math.log10(ms)) + 1 - _DIGITS)
    whole = math.ceil(ms / unit * (1 + 1e-9))  # a number of few digits itself may be a bit above
    return float(f"{whole * unit:.{_DIGITS}g}")
