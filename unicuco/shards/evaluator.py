"""Judging strategies on a model in stages: the same contract as `LocalEvaluator`, the same numbers.

A `StageEvaluator` is one stage with its drop order and Fisher sums. A strategy goes through all of
them as one message, a `Relay`: hidden states on the way to the logits and, where derivatives are
asked for, their gradients on the way back (`pass_through`). Every message is about the whole text,
so a block is cut once per strategy, and stages work on different strategies at the same time.
Whoever has the last word makes the evaluation.

What it does not know: processes. `ShardedEvaluator` has all stages in this one.

Notation: n windows of t tokens, h hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicuco.dimensions import build_cost
from unicuco.errors import RequestError
from unicuco.evaluate.arrays import Arrays, reference_of, unpack
from unicuco.evaluate.device import dtype_of
from unicuco.evaluate.measure import (
    EvaluatorConfig,
    WindowGroup,
    by_axis,
    check_derivatives,
    conclude,
    groups_of,
    windows_of,
)
from unicuco.evaluate.sites import SiteWeights
from unicuco.models.reading import TensorReader
from unicuco.shards.plan import ShardPlan, hidden_size
from unicuco.shards.skeleton import Skeleton
from unicuco.shards.stage import Drops, Stage
from unicuco.types import Ask, Evaluation, Strategy

_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage: which blocks of the model that the evaluator's weights are read of."""

    evaluator: EvaluatorConfig
    blocks: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """What one stage hands to the next about a strategy.

    ``hidden`` is ``n x t x h`` float32: hidden states, or on the way back their gradients;
    ``kl_sums`` every window's KL, once there are logits; ``slopes`` dKL/ds by site path, for each
    group of windows; ``seconds`` that stages spent so far.
    """

    hidden: NDArray[np.generic]
    kl_sums: tuple[float, ...] = ()
    slopes: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0


# What identifies a strategy on its way through: one is judged at several fidelities.
_Key = tuple[str, int | None]


class StageEvaluator:
    """One stage of an evaluator.

    Args:
        config: the stage's.
        arrays: of `stage_arrays`.

    Raises:
        ModelError: its weights can't be read, or the model can't be taken apart.
        RequestError: there are other dimensions than sparsity.
    """

    def __init__(self, config: StageConfig, arrays: Arrays) -> None:
        evaluator = config.evaluator
        if evaluator.threads:
            torch.set_num_threads(evaluator.threads)
        if evaluator.dimensions != ("sparsity",):
            raise RequestError("shards judge the dimension sparsity alone; use one shard")
        self.config = evaluator
        self._cost = build_cost(evaluator.profile, evaluator.dimensions, evaluator.granularity)
        tensors = unpack(arrays, evaluator.device)
        self._ids = tensors["text/ids"]
        skeleton = Skeleton(
            evaluator.model_config, evaluator.profile, evaluator.device, dtype_of(evaluator)
        )
        assert evaluator.weights is not None, "stages read their own weights"
        reader = TensorReader(evaluator.weights, skeleton.model)
        self.stage = Stage(skeleton, config.blocks, reader)
        self.stage.use(
            SiteWeights(
                self.stage.dense,
                {site.path: tensors[f"rank/{site.path}"] for site in self.stage.sites},
                {site.path: tensors[f"fisher/{site.path}"] for site in self.stage.sites},
                self.stage.sites,
                levels=evaluator.levels,
            )
        )
        self._reference = reference_of(tensors) if self.stage.is_last else None
        self._received: dict[_Key, list[Tensor]] = {}

    def forward(self, ask: Ask, relay: Relay | None) -> Relay | Evaluation:
        """Take a strategy forward; the last stage also turns round with it.

        Args:
            ask: what to judge.
            relay: of the stage before; none: this is the first.

        Returns:
            What the next stage needs, or of the last stage the stage before; the evaluation if it
            is complete.

        Raises:
            EvaluationError: the KL or a derivative is not finite.
            ValueError: derivatives are asked for where there are none.
        """
        started = time.perf_counter()
        if ask.derivatives:
            check_derivatives(self.config)
        drops = self._drops(ask)
        received: list[Tensor] | None = [] if ask.derivatives else None
        if relay is None:
            relay = Relay(hidden=np.empty(0))
            hidden = self.stage.embed(windows_of(self._ids, ask.tokens))
        else:
            hidden = self._hidden(relay)
        hidden = self.stage.forward(drops, hidden, received)
        if not self.stage.is_last:
            if received is not None:
                self._received[_key(ask)] = received
            return self._handed(relay, hidden, started)
        kl_sums, gradient = self._turn(ask, hidden)
        relay = replace(relay, kl_sums=tuple(kl_sums))
        if received is None:
            return self._concluded(ask, relay, started)
        return self._back(ask, relay, received, gradient, started)

    def backward(self, ask: Ask, relay: Relay) -> Relay | Evaluation:
        """Take a strategy back; the first stage makes the evaluation of it.

        Raises:
            EvaluationError: the KL or a derivative is not finite.
        """
        started = time.perf_counter()
        received = self._received.pop(_key(ask))
        return self._back(ask, relay, received, self._hidden(relay), started)

    def forget(self, ask: Ask) -> None:
        """Drop what is kept for a strategy that another stage gave up."""
        self._received.pop(_key(ask), None)

    def _back(
        self, ask: Ask, relay: Relay, received: list[Tensor], gradient: Tensor, started: float
    ) -> Relay | Evaluation:
        groups = [group.windows for group in self._groups(gradient)]
        gradient, own = self.stage.backward(self._drops(ask), received, gradient, groups)
        known = relay.slopes or ({},) * len(groups)
        slopes = tuple({**mine, **others} for mine, others in zip(own, known, strict=True))
        relay = replace(relay, slopes=slopes)
        if self.stage.is_first:
            return self._concluded(ask, relay, started)
        return self._handed(relay, gradient, started)

    def _turn(self, ask: Ask, hidden: Tensor) -> tuple[list[float], Tensor]:
        """Return every window's KL and, if asked for, its gradient to the last hidden states."""
        assert self._reference is not None, "the last stage has the dense predictions"
        width = hidden.shape[1]
        sums: list[float] = []
        gradient = torch.empty_like(hidden) if ask.derivatives else hidden
        for group in self._groups(hidden):
            for window in group.windows:
                place = slice(window, window + 1)
                with torch.set_grad_enabled(ask.derivatives):
                    end = hidden[place].detach().requires_grad_(ask.derivatives)
                    reference = self._reference.slice(window * width, (window + 1) * width)
                    kl = reference.kl(self.stage.skeleton.logits(end)).sum()
                    if ask.derivatives:
                        (kl / (group.count * width)).backward()
                sums.append(float(kl.detach()))
                if end.grad is not None:
                    gradient[place] = end.grad
        return sums, gradient

    def _groups(self, hidden: Tensor) -> list[WindowGroup]:
        is_whole = hidden.shape[0] * hidden.shape[1] == self._ids.numel()
        return groups_of(self.config, len(hidden), is_whole=is_whole)

    def _drops(self, ask: Ask) -> Drops:
        return self._cost.site_drops(ask.strategy.values)

    def _hidden(self, relay: Relay) -> Tensor:
        (hidden,) = unpack({"hidden": relay.hidden}, self.config.device).values()
        return hidden.to(self.stage.skeleton.dtype)

    def _handed(self, relay: Relay, hidden: Tensor, started: float) -> Relay:
        message = hidden.float().cpu().numpy()
        seconds = relay.seconds + time.perf_counter() - started
        return replace(relay, hidden=message, seconds=seconds)

    def _concluded(self, ask: Ask, relay: Relay, started: float) -> Evaluation:
        count = len(relay.kl_sums)
        sites = self.config.profile.sites
        return conclude(
            self.config,
            ask.strategy,
            windows=(count, windows_of(self._ids, ask.tokens).shape[1]),
            text_tokens=self._ids.numel(),
            kl_sums=relay.kl_sums,
            slopes=[
                by_axis(self.config, [slopes[site.path] for site in sites])
                for slopes in relay.slopes
            ],
            num_dropped=sum(self._drops(ask).values()),
            wall_s=relay.seconds + time.perf_counter() - started,
        )


class ShardedEvaluator:
    """All stages in this process, one after the other.

    Args:
        config: the evaluator's, with where the model's weights are.
        plan: which blocks go together.
        arrays: as `LocalEvaluator` takes them; the model's tensors among them are not looked at.
    """

    def __init__(self, config: EvaluatorConfig, plan: ShardPlan, arrays: Arrays) -> None:
        self.stages = [
            StageEvaluator(stage, stage_arrays(stage, arrays))
            for stage in stage_configs(config, plan)
        ]

    def evaluate(
        self, strategy: Strategy, *, tokens: int | None = None, derivatives: bool = False
    ) -> Evaluation:
        """Measure one strategy; see `LocalEvaluator.evaluate`.

        Raises:
            EvaluationError: the KL or a derivative is not finite.
            ValueError: derivatives are asked of levels.
        """
        ask = Ask(round=0, position=0, strategy=strategy, derivatives=derivatives, tokens=tokens)
        try:
            result: Evaluation = pass_through(
                ask,
                [stage.forward for stage in self.stages],
                [stage.backward for stage in self.stages],
            )
        finally:
            for stage in self.stages:
                stage.forget(ask)
        return result


# Any: messages here, references to them where stages are processes of their own.
Step = Callable[[Ask, Any], Any]


def pass_through(ask: Ask, forward: Sequence[Step], backward: Sequence[Step]) -> Any:
    """Call every stage that an ask needs, each with what the one before returned.

    Args:
        ask: what to judge.
        forward: `StageEvaluator.forward` of each stage in order, or what calls it elsewhere.
        backward: `StageEvaluator.backward` likewise; the last stage's is not needed.

    Returns:
        What the last call returned: the evaluation.
    """
    message = None
    for step in forward:
        message = step(ask, message)
    if ask.derivatives:
        for step in reversed(backward[:-1]):
            message = step(ask, message)
    return message


def stage_configs(config: EvaluatorConfig, plan: ShardPlan) -> list[StageConfig]:
    """Return every stage's configuration in order."""
    return [StageConfig(evaluator=config, blocks=blocks) for blocks in plan.stages]


def stage_arrays(config: StageConfig, arrays: Arrays) -> Arrays:
    """Return what of an evaluator's arrays one stage needs: its drop order, and the text.

    The dense predictions are the last stage's alone.
    """
    profile = config.evaluator.profile
    own = {site.path for site in profile.sites if site.block in config.blocks}
    is_last = config.blocks.stop == profile.num_blocks
    return {
        name: array
        for name, array in arrays.items()
        if name.partition("/")[2] in own
        or name == "text/ids"
        or (is_last and name.startswith("text/"))
    }


def relay_bytes(config: EvaluatorConfig, arrays: Arrays) -> int:
    """Return the bytes of one message about the whole text."""
    return int(arrays["text/ids"].size) * hidden_size(config.profile) * _FLOAT_BYTES


def _key(ask: Ask) -> _Key:
    return ask.strategy.key, ask.tokens
