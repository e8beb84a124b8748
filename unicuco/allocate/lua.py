"""Lua-LLM: one learned threshold per output row on the row's Wanda ranks, weights frozen.

A weight's score is its place in its row's empirical distribution, s = (rank + 1) / i in (0, 1]; the
row's threshold t makes the soft mask σ(i (s - t)) of the forward pass, and AdamW lowers the next-
token loss plus λ times the absolute log ratio of the kept fraction (rounded, its gradient straight
through) to the wanted one. At the end every mask is rounded (NeurIPS 2025; the released code's
constants; it does not save what it learned, this does).

The site counts become the strategy, exact by projection; the counts of the rows become a `RowRule`,
which any count of the site can be cut by. The published data set, WikiText-103, is in-domain for a
test on WikiText-2; here the run's own calibration text is used, which the test text never overlaps.

What it does not know: the weights' scores themselves; ranks are all it sees, so any rising
transform of the scores learns the same.

Notation: o rows and i columns of a site, s place in the row, t threshold, p wanted kept fraction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
from unicuco.errors import RunError
from unicuco.files import replace_with
from unicuco.rows import RowRule
from unicuco.types import Strategy

_BYTES_PER_WEIGHT: Final = 4 * 6  # ranks as float, logits, mask, masked weight and two gradients
_LEAST_LOGIT: Final = -60.0  # below, masks and what they multiply would be subnormal numbers
_FORMAT: Final = 1
_HEADER: Final = "unicuco.lua"


@dataclass(frozen=True, slots=True, kw_only=True)
class LuaOptions:
    """AdamW for ``steps`` steps of one window each (published: 500 of 2,048 tokens).

    ``learning_rate`` is the released code's default (its command has 1e-4); with a fifth of the
    steps, larger ones were worse on validation text (`benchmarks.rates`). ``weight_decay`` and
    ``budget_weight`` (λ) are published.
    """

    steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    budget_weight: float = 16.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LuaThresholds:
    """What was learned for one target.

    Attributes:
        sparsity: the target.
        thresholds: site path -> ``o`` float32.
        soft_loss: next-token loss on the calibration text under the soft masks, nats per token.
        hard_loss: the same under the rounded masks: the gap between them is what rounding costs.
    """

    sparsity: float
    thresholds: Mapping[str, Tensor]
    soft_loss: float
    hard_loss: float

    def row_counts(self, columns: Mapping[str, int]) -> dict[str, Tensor]:
        """Return how many weights every row drops, ``o`` int64, given each site's columns.

        Rank r goes when σ(r + 1 - i t) rounds to zero, one half included: when r + 1 <= i t.
        """
        return {
            path: torch.floor(columns[path] * t.double()).clamp(0, columns[path]).long()
            for path, t in self.thresholds.items()
        }

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        header = {
            "format": _FORMAT,
            "sparsity": self.sparsity,
            "soft_loss": self.soft_loss,
            "hard_loss": self.hard_loss,
        }
        tensors = {name: t.contiguous() for name, t in self.thresholds.items()}
        metadata = {_HEADER: json.dumps(header, sort_keys=True)}
        replace_with(path, lambda target: save_file(tensors, target, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> LuaThresholds:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header.pop("format", None) != _FORMAT:
                raise ValueError("another format")
            return cls(thresholds=tensors, **{name: float(v) for name, v in header.items()})
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path} holds no thresholds that can be read: {error}") from error


class Lua:
    """Lua-LLM (see the module's docstring); learns anew for every target."""

    name = "lua"

    def __init__(self, context: AllocationContext, options: LuaOptions | None = None) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._options = options or LuaOptions()
        self._learned: dict[float, LuaThresholds] = {}
        self._targets: dict[str, float] = {}

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity, row thresholds left to `row_rule`.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches.
            AllocationError: gradients don't fit into memory, or a loss is not finite.
        """
        check_reachable(self._space, sparsities)
        fractions = [self._site_sparsities(sparsity) for sparsity in sparsities]
        strategies = site_strategies(self._space, self._evidence, sparsities, fractions)
        for strategy, sparsity in zip(strategies, sparsities, strict=True):
            self._targets[strategy.key] = sparsity
        return strategies

    def row_rule(self, strategy: Strategy) -> RowRule:
        """Return how every site of one of its own strategies spreads its drops over its rows.

        Raises:
            ValueError: the strategy is none that this allocator answered.
        """
        if strategy.key not in self._targets:
            raise ValueError(f"strategy {strategy.key[:12]} is none of this allocator's own")
        return RowRule.from_counts(self._row_counts(self._targets[strategy.key]))

    def thresholds(self, sparsity: float) -> LuaThresholds:
        """Return what is learned for a target, learning it at the first call."""
        if sparsity not in self._learned:
            self._learned[sparsity] = learn_thresholds(self._evidence, sparsity, self._options)
        return self._learned[sparsity]

    def _row_counts(self, sparsity: float) -> dict[str, Tensor]:
        columns = {site.path: site.num_columns for site in self._evidence.profile.sites}
        return self.thresholds(sparsity).row_counts(columns)

    def _site_sparsities(self, sparsity: float) -> Tensor:
        counts = self._row_counts(sparsity)
        sites = self._evidence.profile.sites
        return torch.tensor([float(counts[s.path].sum()) / s.num_weights for s in sites])


def row_places(rank: Tensor) -> Tensor:
    """Return s, ``o x i`` float32 in (0, 1]: the share of its row that goes before it, and itself.

    Equal scores go one after the other, by column, as in the rank store.
    """
    return (rank.float() + 1) / rank.shape[1]


def soft_mask(rank: Tensor, thresholds: Tensor) -> Tensor:
    """Return σ(i (s - t)), ``o x i`` in (0, 1), from ``o x i`` ranks and ``o`` thresholds.

    Logits end at -60, far below what a float32 sum notices: without an end, subnormal numbers made
    learning ten times as slow.
    """
    logits = rank.shape[1] * (row_places(rank) - thresholds[:, None])
    return torch.sigmoid(logits.clamp(min=_LEAST_LOGIT))


def budget_penalty(masks: Sequence[Tensor], kept: float) -> Tensor:
    """Return R: the absolute log ratio of the kept fraction, rounded, to the wanted one.

    The gradient of rounding is passed straight through.
    """
    total = sum(mask.numel() for mask in masks)
    rounded = [mask + (mask.round() - mask).detach() for mask in masks]
    fraction = torch.stack([mask.sum() for mask in rounded]).sum() / total
    return torch.log(fraction.clamp(min=1e-6) / kept).abs()


def learn_thresholds(evidence: Evidence, sparsity: float, options: LuaOptions) -> LuaThresholds:
    """Learn the rows' thresholds for one target; the model is left as it is to the bit.

    Raises:
        AllocationError: gradients don't fit into memory, or a loss is not finite.
    """
    masked = _MaskedModel(evidence)
    t = {
        site.path: torch.full((site.num_rows,), sparsity).requires_grad_(True)
        for site in evidence.profile.sites
    }
    optimizer = torch.optim.AdamW(
        t.values(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    generator = torch.Generator().manual_seed(evidence.seed)
    windows = evidence.calibration.ids.split(1)
    with torch.enable_grad():
        for window in windows_in_turn(len(windows), options.steps, generator):
            masks = masked.soft(t)
            loss = masked.loss(masks, windows[window])
            penalty = budget_penalty(list(masks.values()), max(1.0 - sparsity, 1e-3))
            descend(Lua.name, optimizer, loss + options.budget_weight * penalty)
    learned = {path: threshold.detach() for path, threshold in t.items()}
    with torch.no_grad():
        soft = masked.soft(learned)
        hard = {path: mask.round() for path, mask in soft.items()}
        losses = [
            float(torch.stack([masked.loss(masks, ids) for ids in windows]).mean())
            for masks in (soft, hard)
        ]
    return LuaThresholds(
        sparsity=sparsity, thresholds=learned, soft_loss=losses[0], hard_loss=losses[1]
    )


class _MaskedModel:
    """The dense model under masks."""

    def __init__(self, evidence: Evidence) -> None:
        check_memory(Lua.name, evidence.profile.num_site_weights * _BYTES_PER_WEIGHT)
        self._model = evidence.loaded.model
        self._sites = evidence.profile.sites
        self._weights = {site.path: evidence.weight(site) for site in self._sites}
        self._ranks = {site.path: evidence.ranks.ranks[site.path] for site in self._sites}

    def soft(self, thresholds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every site's soft mask."""
        return {path: soft_mask(self._ranks[path], t) for path, t in thresholds.items()}

    def loss(self, masks: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """Return the mean next-token loss of ``n x t`` tokens under masks."""
        weights = {
            f"{site.path}.weight": stored(self._weights[site.path] * masks[site.path], site)
            for site in self._sites
        }
        output = call_with_weights(self._model, weights, input_ids=ids, use_cache=False)
        return token_loss(output.logits, ids)
