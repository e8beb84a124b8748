"""AdapMTL on a language model: one soft threshold per block, learned on the calibration text.

Weights stay as they are; a block's s decides which of its weights are zero, |w| <= σ(s), and so the
sparsity of every site in it. The published training has one goal and finds its weight decay by
hand; here the decay grows geometrically over the steps, so that one pass runs through all
sparsities: at every moment thresholds rise where the loss pushes back less than the decay pushes
on. A target takes the thresholds of the first step that reaches it, exactly projected; one beyond
the last step takes the last. With one text there is one task, whose loss weight is 1; joint
training with several heads is `soft_threshold.train_jointly`.

What it does not know: Wanda's scores; they only decide the order in which the counts found here are
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.evidence import Evidence
from unicuco.allocate.learned import (
    call_with_weights,
    check_memory,
    check_reachable,
    descend,
    site_strategies,
    stored,
    token_loss,
    windows_in_turn,
)
from unicuco.allocate.soft_threshold import BETAS, num_zeroed, soft_threshold
from unicuco.types import Strategy

_BYTES_PER_WEIGHT: Final = 4 * 5  # magnitude, difference, sign, result and its gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapMtlOptions:
    """Adam on s for ``steps`` steps of one window each, from ``initial``.

    ``decay`` is the weight decay of the first and of the last step; ``learning_rate`` the best of
    six over four sparsities of validation text (`benchmarks.rates`): lower ones stay nearer to
    uniform, which is better at 0.5 and 0.6, and don't reach 0.8.
    """

    steps: int = 200
    initial: float = -8.0
    learning_rate: float = 0.02
    decay: tuple[float, float] = (1e-4, 10.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdPath:
    """What one pass came to.

    Attributes:
        thresholds: ``steps x blocks`` s after every step.
        fractions: ``steps x sites`` share of zeros in every site.
        sparsity: ``steps`` share of zeros over all sites.
    """

    thresholds: Tensor
    fractions: Tensor
    sparsity: Tensor

    def at(self, target: float) -> Tensor:
        """Return the sites' sparsities of the first step that reaches a target, or the last."""
        reached = (self.sparsity >= target).nonzero()
        return self.fractions[int(reached[0]) if len(reached) else -1]


class AdapMtl:
    """AdapMTL with blocks as components (see the module's docstring); one pass, all targets."""

    name = "adapmtl"

    def __init__(self, context: AllocationContext, options: AdapMtlOptions | None = None) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._options = options or AdapMtlOptions()
        self._path: ThresholdPath | None = None

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches.
            AllocationError: gradients don't fit into memory, or a loss is not finite.
        """
        check_reachable(self._space, sparsities)
        if self._path is None:
            self._path = learn_path(self._evidence, self._options)
        fractions = [self._path.at(sparsity) for sparsity in sparsities]
        return site_strategies(self._space, self._evidence, sparsities, fractions)


def learn_path(evidence: Evidence, options: AdapMtlOptions) -> ThresholdPath:
    """Let the thresholds rise through all sparsities; the model is left as it is to the bit.

    Raises:
        AllocationError: gradients don't fit into memory, or a loss is not finite.
    """
    profile = evidence.profile
    check_memory(AdapMtl.name, profile.num_site_weights * _BYTES_PER_WEIGHT)
    s = torch.full((profile.num_blocks,), options.initial).requires_grad_(True)
    optimizer = torch.optim.Adam([s], lr=options.learning_rate, betas=BETAS)
    generator = torch.Generator().manual_seed(evidence.seed)
    windows = evidence.calibration.ids.split(1)
    first, last = options.decay
    turns = windows_in_turn(len(windows), options.steps, generator)
    thresholds: list[Tensor] = []
    fractions: list[Tensor] = []
    with torch.enable_grad():
        for step, window in enumerate(turns):
            decay = first * (last / first) ** (step / max(1, options.steps - 1))
            pull = 0.5 * decay * s.square().sum()  # its gradient is the weight decay
            descend(AdapMtl.name, optimizer, _loss(evidence, s, windows[window]) + pull)
            thresholds.append(s.detach().clone())
            fractions.append(_fractions(evidence, thresholds[-1]))
    sizes = torch.tensor([float(site.num_weights) for site in profile.sites]).double()
    table = torch.stack(fractions)
    return ThresholdPath(
        thresholds=torch.stack(thresholds),
        fractions=table,
        sparsity=(table * sizes).sum(1) / sizes.sum(),
    )


def _loss(evidence: Evidence, s: Tensor, ids: Tensor) -> Tensor:
    weights = {
        f"{site.path}.weight": stored(soft_threshold(evidence.weight(site), s[site.block]), site)
        for site in evidence.profile.sites
    }
    output = call_with_weights(evidence.loaded.model, weights, input_ids=ids, use_cache=False)
    return token_loss(output.logits, ids)


def _fractions(evidence: Evidence, s: Tensor) -> Tensor:
    shares = [
        num_zeroed(evidence.weight(site), s[site.block]) / site.num_weights
        for site in evidence.profile.sites
    ]
    return torch.tensor(shares, dtype=torch.float64)
