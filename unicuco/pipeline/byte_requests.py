"""`ByteRequests`: requests to a run that learned bits -> strategies of the axes that they move.

What a request counts decides which axes help it; the others stay at what changes nothing.

- ``max_bytes``: weights as a folder stores them and an engine holds them: weight bits.
- ``max_total_bytes``: the same, and the keys and values of ``context`` x ``batch`` tokens: weight
  bits and KV bits together. Zeros save neither.
- ``max_packed_bytes``: weights in a lossless form (`pack`), where zeros take a bit: sparsity and
  weight bits together.
- ``sparsity`` and ``max_params``: zeros alone.

The network answers with its decision at the target of equal share; what it says of the axes that
move is projected onto the exact budget of their own space. Where zeros and bits both help,
bits alone are projected too, and what is predicted to be better is the answer: few zeros don't pay.

What it does not know: weights and files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import torch

from unicuco.dimensions import ByteCost, build_space
from unicuco.errors import InfeasibleRequestError
from unicuco.space import StrategySpace
from unicuco.stratnet import StratNetAllocator
from unicuco.types import Prediction, Request, Strategy, Target

_MOVED: Final = {
    Target.SPARSITY: ("sparsity",),
    Target.MAX_PARAMS: ("sparsity",),
    Target.MAX_BYTES: ("weight_bits",),
    Target.MAX_TOTAL_BYTES: ("weight_bits", "kv_bits"),
    Target.MAX_PACKED_BYTES: ("sparsity", "weight_bits"),
}
_MAX_PARTS: Final = 64  # kept at a time, of different contexts and batches


class ByteRequests:
    """Answers the requests above for one run.

    Args:
        space: of the run.
        cost: of the space.
        allocator: its StratNet.
        share_range: of the sites' bytes that go, as learned.
        predict: the KL of strategies.
    """

    def __init__(
        self,
        space: StrategySpace,
        cost: ByteCost,
        allocator: StratNetAllocator,
        share_range: tuple[float, float],
        predict: Callable[[Sequence[Strategy]], list[Prediction]],
    ) -> None:
        self._space = space
        self._cost = cost
        self._allocator = allocator
        self._range = share_range
        self._predict = predict
        self._parts: dict[tuple[tuple[str, ...], int], StrategySpace] = {}

    def moves(self, request: Request) -> bool:
        """Say whether a request is one of these, not one that the whole front answers."""
        return request.target in _MOVED

    def answer(self, request: Request) -> Strategy:
        """Return the strategy of a request.

        Raises:
            InfeasibleRequestError: the run can't meet it.
        """
        learned = [dimension.name for dimension in self._cost.dimensions]
        names = tuple(name for name in _MOVED[request.target] if name in learned)
        tokens = kv_tokens(request, self._cost)
        if not names:
            return self._unmoved(request, tokens)
        found = self._within(request, names, tokens)
        if request.target is not Target.MAX_PACKED_BYTES or len(names) == 1:
            return found
        answers = [found]
        with suppress(InfeasibleRequestError):  # bits alone may not get there
            answers.append(self._within(request, ("weight_bits",), tokens))
        means = [prediction.mean for prediction in self._predict(answers)]
        return answers[means.index(min(means))]

    def _within(self, request: Request, names: tuple[str, ...], tokens: int) -> Strategy:
        """Return the strategy of a request that some dimensions alone meet."""
        part = self._part(names, tokens)
        if request.target is Target.SPARSITY:
            budget = part.kept_for_sparsity(request.value)
        else:
            budget = int(request.value)
        fewest, most = part.kept_range()
        if budget < fewest:
            raise _too_small(request, fewest, part)
        share = (part.cost.total_size - min(budget, most)) / part.cost.site_size
        target = torch.tensor([share], dtype=torch.float64).clamp(*self._range)
        columns = [self._space.names.index(name) for name in part.names]
        (answer,) = part.decode_exact(self._allocator.units(target)[:, columns], [budget])
        return self._lifted(answer)

    def _unmoved(self, request: Request, tokens: int) -> Strategy:
        """Return the dense strategy if it meets a request that no axis of the run helps."""
        dense = Strategy(settings=tuple((name, 0.0) for name in self._space.names))
        size = self._cost.num_bytes(dense.values) + self._cost.kv_bytes(dense.values, tokens)
        if request.target is Target.MAX_PARAMS:
            size = self._cost.total_params
        if request.value == 0.0 or (
            request.target is not Target.SPARSITY and request.value >= size
        ):
            return dense
        needed = " or ".join(_MOVED[request.target])
        raise InfeasibleRequestError(
            f"{request.target} {request.value:g} can't be met: this run did not learn {needed}; "
            f"learn one with --dimensions {','.join(_MOVED[request.target])}",
            nearest=0.0 if request.target is Target.SPARSITY else float(size),
        )

    def _part(self, names: tuple[str, ...], tokens: int) -> StrategySpace:
        """Return the space of some of the run's dimensions, with so many tokens cached."""
        if (names, tokens) not in self._parts:
            if len(self._parts) > _MAX_PARTS:
                self._parts.clear()
            self._parts[names, tokens] = build_space(
                self._cost.profile, names, self._cost.granularity, kv_tokens=tokens
            )
        return self._parts[names, tokens]

    def _lifted(self, strategy: Strategy) -> Strategy:
        own = dict(strategy.settings)
        return Strategy(settings=tuple((name, own.get(name, 0.0)) for name in self._space.names))


def kv_tokens(request: Request, cost: ByteCost) -> int:
    """Return how many tokens' keys and values a request counts.

    Raises:
        InfeasibleRequestError: a longer context than the model's.
    """
    if request.target is not Target.MAX_TOTAL_BYTES:
        return 0
    most = cost.profile.max_context
    if request.context is not None and request.context > most:
        raise InfeasibleRequestError(
            f"context {request.context:,} is longer than this model's, {most:,} tokens",
            nearest=float(most),
        )
    return (request.context or most) * (request.batch or 1)


def _too_small(request: Request, fewest: int, part: StrategySpace) -> InfeasibleRequestError:
    if request.target is Target.SPARSITY:
        nearest = part.highest_sparsity
        return InfeasibleRequestError(
            f"sparsity {request.value:g} can't be met; the nearest that can is {nearest:g}",
            nearest=nearest,
        )
    return InfeasibleRequestError(
        f"{request.target} {int(request.value):,} can't be met; the nearest that can is {fewest:,}",
        nearest=float(fewest),
    )
