"""What judging a strategy means, whoever runs the model: windows, groups of them, the evaluation.

An evaluator in one process and one whose model is spread over several both read the text, count and
add up here, so that they can only agree.

What it does not know: where the model is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from unicuco.dimensions import Granularity, have_slopes
from unicuco.errors import EvaluationError
from unicuco.models.weights import WeightSource
from unicuco.types import Evaluation, ModelProfile, Strategy, TaskValue

_COST_WITH_DERIVATIVES: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatorConfig:
    """What an evaluator needs besides its arrays; small, and the same on every node.

    ``model_config`` is the model's configuration as JSON; ``threads`` are torch threads (0: leave
    as they are). ``tasks`` are the texts, of equally many windows each, that the search text is
    made of, where there are several. ``levels`` is the folder of a level database that sites are
    taken from instead of being cut by the rank store; such evaluators know no derivatives and no
    row rules. ``weights`` is where stages read theirs; others are given them. ``device`` and
    ``dtype`` are torch's names (`unicuco.evaluate.device`).
    """

    model_config: str
    profile: ModelProfile
    dimensions: tuple[str, ...]
    granularity: Granularity
    text_digest: str
    threads: int = 0
    tasks: tuple[str, ...] = ()
    levels: str = ""
    weights: WeightSource | None = None
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGroup:
    """Windows whose KL is averaged: those of one task, or all, under no name."""

    task: str
    first: int
    count: int

    @property
    def windows(self) -> range:
        """The windows' places in the text."""
        return range(self.first, self.first + self.count)


def check_derivatives(config: EvaluatorConfig) -> None:
    """Refuse derivatives where there are none.

    Raises:
        ValueError: sites come from levels, or the KL has no derivative along some axes.
    """
    if config.levels:
        raise ValueError("there are no derivatives under a row rule or of levels")
    if not have_slopes(config.profile, config.dimensions):
        raise ValueError(
            f"there are no derivatives along axes of {', '.join(config.dimensions)} of this model"
        )


def windows_of(ids: Tensor, tokens: int | None) -> Tensor:
    """Return the first of ``n x context`` windows, at least ``tokens`` tokens; none: all.

    Fewer than a window holds are its first ones: a causal model predicts the same for them.
    """
    if tokens is None:
        return ids
    if tokens < ids.shape[1]:
        return ids[:1, : max(1, tokens)]
    return ids[: math.ceil(tokens / ids.shape[1])]


def groups_of(config: EvaluatorConfig, num_windows: int, *, is_whole: bool) -> list[WindowGroup]:
    """Return the groups of a text's first windows: one per task if it is the whole text."""
    if not (config.tasks and is_whole):
        return [WindowGroup(task="", first=0, count=num_windows)]
    count = num_windows // len(config.tasks)
    return [
        WindowGroup(task=task, first=k * count, count=count) for k, task in enumerate(config.tasks)
    ]


def conclude(
    config: EvaluatorConfig,
    strategy: Strategy,
    *,
    windows: tuple[int, int],
    text_tokens: int,
    kl_sums: Sequence[float],
    slopes: Sequence[Sequence[float]],
    num_dropped: int,
    wall_s: float,
) -> Evaluation:
    """Make an evaluation of what was measured.

    Args:
        config: the evaluator's.
        strategy: that was judged.
        windows: how many windows were run, and tokens in each.
        text_tokens: of the whole text.
        kl_sums: every window's KL, summed over its tokens.
        slopes: dKL/ds along every axis, per group of windows; empty: not asked for.
        num_dropped: weights that all sites together lost.
        wall_s: what it took.

    Raises:
        EvaluationError: the KL or a derivative is not finite.
    """
    count, width = windows
    is_whole = count * width == text_tokens
    values = []
    for k, group in enumerate(groups_of(config, count, is_whole=is_whole)):
        kl = sum(kl_sums[window] for window in group.windows) / (group.count * width)
        kl = max(kl, 0.0) if group.task else kl
        gradient = tuple(slopes[k]) if slopes else None
        values.append(TaskValue(task=group.task, kl=kl, gradient=gradient))
    kl, gradient = _mean_of(values)
    if not all(map(math.isfinite, (kl, *(gradient or ())))):
        raise EvaluationError(
            f"strategy {strategy.key[:12]} gives a KL of {kl}: the pruned model overflows",
            strategy_key=strategy.key,
        )
    return Evaluation(
        strategy_key=strategy.key,
        kl=max(kl, 0.0),
        kept_fraction=1.0 - num_dropped / config.profile.num_site_weights,
        gradient=gradient,
        tokens=count * width,
        text_digest=config.text_digest,
        cost_units=count * width / text_tokens * (_COST_WITH_DERIVATIVES if slopes else 1.0),
        wall_s=wall_s,
        tasks=tuple(value for value in values if value.task),
    )


def _mean_of(values: Sequence[TaskValue]) -> tuple[float, tuple[float, ...] | None]:
    """Return the mean KL and derivative of groups of equal size."""
    kl = sum(value.kl for value in values) / len(values)
    gradients = [value.gradient for value in values if value.gradient is not None]
    if len(gradients) < len(values):
        return kl, None
    return kl, tuple(sum(parts) / len(values) for parts in zip(*gradients, strict=True))


def by_axis(config: EvaluatorConfig, by_site: Sequence[float]) -> list[float]:
    """Return dKL/ds along every axis of sparsity, of every site's; a block axis sums its sites."""
    if config.granularity is Granularity.LAYER:
        return list(by_site)
    by_block = [0.0] * config.profile.num_blocks
    for site, value in zip(config.profile.sites, by_site, strict=True):
        by_block[site.block] += value
    return by_block
