"""A response of any number of axes that is not additive, with an optimum that can be computed.

No model is behind it: an evaluation is a formula. Every site costs alone what a power of its share
of zeros costs, sizes drawn log-normally and powers evenly; neighbours in a block and the same sites
of neighbouring blocks add, or take off, a share of the geometric mean of their costs, so that what
is best for one depends on the others:

    KL(u) = sum_i e_i(u_i) + sum_(i, j) c_ij sqrt(e_i(u_i) e_j(u_j)),   e_i(u) = a_i u^p_i

with c_ij in [-0.4, 1.2]; at most four neighbours keep it above a fifth of the first sum. A search
is told curves as a Fisher estimate would give them: of single sites, each wrong by a factor.

What it does not know: how real models respond; only that they are not additive either.

Notation: B blocks of 8 sites, d = 8 B axes, b points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions import Granularity, build_space
from unicuco.search import SearchConfig
from unicuco.testing.profiles import make_profile
from unicuco.types import Evaluation, Strategy

# Rows and columns of a block's matrices: they weigh unequally in a budget, as real ones do.
_SHAPES: Final = ((64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160), (16, 64))
SITES: Final = len(_SHAPES)
_SIZES: Final = 1.2  # log deviation of what sites cost
_POWERS: Final = (2.0, 5.0)
_COUPLING: Final = (-0.4, 1.2)
_CURVE_ERROR: Final = 0.8  # log deviation of what the curves say of a site
_SLOPE_ERROR: Final = 0.15  # deviation of a measured derivative, as a share of it
_KNOTS: Final = 65
_RANGE: Final = (0.05, 0.9)
_WORST: Final = 3.0  # nats per token of the uniform strategy at the highest target
_STEPS: Final = 600
_STARTS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Law:
    """``sizes``, ``powers``: d each; ``pairs``: p x 2 axes and ``couplings``: p."""

    sizes: Tensor
    powers: Tensor
    pairs: Tensor
    couplings: Tensor

    def alone(self, points: Tensor) -> Tensor:
        """Return the ``b x d`` costs of every site alone."""
        return self.sizes * points.clamp(min=1e-9).pow(self.powers)

    def kl(self, points: Tensor) -> Tensor:
        """Return the ``b`` KL at ``b x d`` unit points."""
        alone = self.alone(points)
        roots = alone.sqrt()
        together = roots[:, self.pairs[:, 0]] * roots[:, self.pairs[:, 1]]
        return alone.sum(1) + (self.couplings * together).sum(1)

    def scaled(self, uniform: Tensor) -> _Law:
        """Return the law by which a ``1 x d`` point costs `_WORST`."""
        return replace(self, sizes=self.sizes * (_WORST / float(self.kl(uniform)[0])))


class CoupledResponse:
    """A response to judge strategies by; ``config`` is of a search of its front.

    Args:
        num_blocks: B.
        seed: of everything that is drawn.
    """

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        profile = make_profile([_SHAPES] * num_blocks)
        self.space = build_space(profile, ("sparsity",), Granularity.LAYER)
        uniform = self.space.encode([self.space.uniform(_RANGE[1])])
        self._law = _draw(self.space.num_axes, generator).scaled(uniform)
        slips = torch.randn(self.space.num_axes, generator=generator, dtype=torch.float64)
        knots = torch.linspace(0, 1, _KNOTS, dtype=torch.float64)
        alone = self._law.alone(knots[:, None].expand(-1, self.space.num_axes)).mT
        self.config = SearchConfig(
            preset="default",
            profile=profile,
            dimensions=("sparsity",),
            granularity=Granularity.LAYER,
            curves=alone * (_CURVE_ERROR * slips).exp()[:, None],
            sparsity_range=_RANGE,
            seed=seed,
        )

    def evaluate(self, strategy: Strategy, *, derivatives: bool = False) -> Evaluation:
        """Judge a strategy; derivatives are off by a share that is always the same for it."""
        point = self.space.encode([strategy]).requires_grad_(True)
        kl = self._law.kl(point)[0]
        gradient = None
        if derivatives:
            (slopes,) = torch.autograd.grad(kl, point)
            slips = torch.randn(
                point.shape,
                generator=torch.Generator().manual_seed(int(strategy.key[:12], 16)),
                dtype=torch.float64,
            )
            slopes = slopes * (1 + _SLOPE_ERROR * slips) / self.space.span
            gradient = tuple(slopes[0].tolist())
        kept = self.space.cost.kept_params(strategy.values)
        return Evaluation(
            strategy_key=strategy.key,
            kl=float(kl.detach()),
            kept_fraction=kept / self.space.cost.total_params,
            gradient=gradient,
            tokens=1,
            text_digest="",
            cost_units=3.0 if derivatives else 1.0,
            wall_s=0.0,
        )

    def optimum(self, sparsities: Sequence[float], seed: int = 0) -> list[Strategy]:
        """Return the best strategies that descent on the response itself finds.

        From uniform and from random starts, all targets at once; the best of a target's is its
        optimum.
        """
        budgets = [self.space.kept_for_sparsity(s) for s in sparsities]
        kept = torch.tensor(budgets, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        best: list[tuple[float, Strategy]] = [(math.inf, self.space.uniform(0.5))] * len(budgets)
        for start in range(_STARTS):
            z = torch.randn(
                len(budgets), self.space.num_axes, generator=generator, dtype=torch.float64
            )
            z = (z * start / _STARTS).requires_grad_(True)
            optimizer = torch.optim.Adam([z], lr=0.03)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS, 1e-3)
            for _ in range(_STEPS):
                loss = self._law.kl(self.space.project_logits(z, kept)).log().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            points = self.space.project_logits(z, kept).detach()
            found = self.space.decode_exact(points, budgets)
            new = zip(self.kl(found), found, strict=True)
            best = [min(pair, key=itemgetter(0)) for pair in zip(best, new, strict=True)]
        return [strategy for _, strategy in best]

    def kl(self, strategies: Sequence[Strategy]) -> list[float]:
        """Return the KL of strategies."""
        values: list[float] = self._law.kl(self.space.encode(strategies)).tolist()
        return values


def _draw(d: int, generator: torch.Generator) -> _Law:
    low, high = _POWERS
    within = [(a, a + 1) for a in range(d - 1) if (a + 1) % SITES]
    across = [(a, a + SITES) for a in range(d - SITES)]
    pairs = torch.tensor(within + across)
    least, most = _COUPLING
    return _Law(
        sizes=(_SIZES * torch.randn(d, generator=generator, dtype=torch.float64)).exp(),
        powers=low + (high - low) * torch.rand(d, generator=generator, dtype=torch.float64),
        pairs=pairs,
        couplings=least
        + (most - least) * torch.rand(len(pairs), generator=generator, dtype=torch.float64),
    )
