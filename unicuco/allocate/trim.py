"""TRIM: a sparsity per output row inside every site, on top of any allocator (arXiv 2505.16743).

The sites keep the weights that the allocator below left them; TRIM moves drops between the rows of
a site so that its outputs on calibration inputs turn less, and falls back to equal rows where it
finds nothing better. So it never makes a site worse by its own metric. Its answer is a `RowRule`.

Notation: a site has o rows of width i, X are ``n x i`` inputs (the last token of every calibration
sequence), Y = X W^T, x the rows' sparsities, q the rows' cosine between Y and its pruned form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext, Allocator
from unicuco.allocate.evidence import Evidence, TextPart
from unicuco.allocate.owl import OWL
from unicuco.calibration import watch_inputs
from unicuco.rows import RowRule, row_counts
from unicuco.types import Site, Strategy

_LONGEST_SEQUENCE: Final = 64
_EPSILON: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimOptions:
    """The published settings, with shorter sequences (64 tokens at most instead of 2,048).

    ``rates`` are tried in order until one no longer improves, ``fallback_rates`` only if none of
    them beats equal rows; an empty list leaves Wanda as it is.
    """

    samples: int = 256
    iterations: int = 10
    rates: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
    fallback_rates: tuple[float, ...] = (-0.01, -0.02, -0.04)
    max_row_sparsity: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReport:
    """What happened to one site: cosine of all outputs and variance of row cosines, before, after.

    ``rate`` is the learning rate whose rows were taken; 0: rows stayed equal.
    """

    path: str
    rate: float
    cosine_before: float
    cosine_after: float
    row_variance_before: float
    row_variance_after: float


class Trim:
    """Row-wise refinement of another allocator.

    Args:
        context: with evidence.
        base: decides the sites; none: OWL.
        options: of the refinement.

    Attributes:
        reports: one per site of the strategy that `row_rule` refined last.
    """

    name = "trim"

    def __init__(
        self,
        context: AllocationContext,
        base: Callable[[AllocationContext], Allocator] = OWL,
        options: TrimOptions | None = None,
    ) -> None:
        self._cost = context.space.cost
        self._evidence = context.require_evidence(self.name)
        self._options = options or TrimOptions()
        self._base = base(context)
        self._inputs: Mapping[str, Tensor] | None = None
        self.reports: tuple[RowReport, ...] = ()

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return the strategies of the allocator below; `row_rule` refines one of them."""
        return self._base.allocate(sparsities)

    def row_rule(self, strategy: Strategy) -> RowRule:
        """Spread every site's dropped weights over its rows.

        Raises:
            TextError: the calibration text is too short for the samples.
        """
        if self._inputs is None:
            self._inputs = last_token_inputs(self._evidence, self._options.samples)
        drops = self._cost.site_drops(strategy.values)
        counts: dict[str, Tensor] = {}
        reports = []
        for site in self._evidence.profile.sites:
            refined, report = refine_rows(
                _Rows(
                    weight=self._evidence.weight(site).float(),
                    rank=self._evidence.ranks.ranks[site.path],
                    inputs=self._inputs[site.path],
                ),
                drops[site.path],
                self._options,
                path=site.path,
            )
            reports.append(report)
            if report.rate:
                counts[site.path] = refined
        self.reports = tuple(reports)
        return RowRule.from_counts(counts)


@dataclass(frozen=True, slots=True)
class _Rows:
    """One site: ``o x i`` weight and drop order, ``n x i`` inputs."""

    weight: Tensor
    rank: Tensor
    inputs: Tensor

    def quality(self, counts: Tensor) -> tuple[float, Tensor]:
        """Return the cosine of all outputs, and ``o`` cosines of the rows."""
        outputs = self.inputs @ self.weight.T  # (n, o)
        kept = self.weight * (self.rank >= counts[:, None])
        pruned = self.inputs @ kept.T
        products = (outputs * pruned).sum(0)
        sizes, pruned_sizes = outputs.square().sum(0), pruned.square().sum(0)
        rows = products / (sizes * pruned_sizes).sqrt().clamp(min=_EPSILON)
        whole = products.sum() / (sizes.sum() * pruned_sizes.sum()).sqrt().clamp(min=_EPSILON)
        return float(whole), rows


def refine_rows(
    rows: _Rows, num_dropped: int, options: TrimOptions, *, path: str = ""
) -> tuple[Tensor, RowReport]:
    """Find how many weights each row of one site should lose.

    Args:
        rows: the site.
        num_dropped: in all; met exactly.
        options: of the refinement.
        path: the site's, for the report.

    Returns:
        ``o`` int64 counts and the report; equal rows where nothing better was found.
    """
    equal = row_counts(*_shape(rows.weight), num_dropped)
    before, row_before = rows.quality(equal)
    best, best_quality, best_rate = equal, before, 0.0
    target = num_dropped / rows.weight.numel()
    if target < options.max_row_sparsity:
        for rates in (options.rates, options.fallback_rates):
            for rate in rates:
                counts, quality = _iterate(rows, num_dropped, rate, options)
                if quality <= best_quality:
                    break
                best, best_quality, best_rate = counts, quality, rate
            if best_rate:
                break
    _, row_after = rows.quality(best)
    return best, RowReport(
        path=path,
        rate=best_rate,
        cosine_before=before,
        cosine_after=best_quality,
        row_variance_before=float(row_before.var(correction=0)),
        row_variance_after=float(row_after.var(correction=0)),
    )


def _iterate(
    rows: _Rows, num_dropped: int, rate: float, options: TrimOptions
) -> tuple[Tensor, float]:
    """Move sparsity towards rows that bear it, and return the best exact counts on the way."""
    target = num_dropped / rows.weight.numel()
    x = torch.full((rows.weight.shape[0],), target, dtype=torch.float64)
    best, best_quality = row_counts(*_shape(rows.weight), num_dropped), -float("inf")
    counts = best
    for _ in range(options.iterations):
        _, quality = rows.quality(counts)
        span = (quality.max() - quality.min()).clamp(min=_EPSILON)
        step = (quality.double() - quality.min()) / span * 2 * rate
        x = (x + step - step.mean()).clamp(0, options.max_row_sparsity)
        x = x + target - x.mean()
        counts = exact_counts(
            x.clamp(0, options.max_row_sparsity), rows.weight.shape[1], num_dropped
        )
        whole, _ = rows.quality(counts)
        if whole > best_quality:
            best, best_quality = counts, whole
    return best, best_quality


def exact_counts(sparsities: Tensor, width: int, num_dropped: int) -> Tensor:
    """Turn ``o`` row sparsities into whole counts that sum to ``num_dropped``.

    As published every row drops ⌊width · x⌋; the few weights that then miss go to the largest
    remainders, rounds of one per row, and what is too much is given back likewise.
    """
    wanted = sparsities * width
    counts = wanted.floor().to(torch.int64).clamp(0, width)
    while missing := num_dropped - int(counts.sum()):
        room = counts < width if missing > 0 else counts > 0
        gain = (wanted - counts) * (1 if missing > 0 else -1)
        order = gain.masked_fill(~room, -torch.inf).argsort(descending=True, stable=True)
        chosen = order[: min(abs(missing), int(room.sum()))]
        counts[chosen] += 1 if missing > 0 else -1
    return counts


def last_token_inputs(evidence: Evidence, samples: int) -> dict[str, Tensor]:
    """Return every site's ``n x i`` float32 inputs at the last token of calibration sequences.

    Raises:
        TextError: the text is too short.
    """
    length = min(_LONGEST_SEQUENCE, evidence.calibration.context)
    tokens = evidence.texts.windows(TextPart.CALIBRATION, tokens=samples * length, context=length)
    found: dict[str, list[Tensor]] = {site.path: [] for site in evidence.profile.sites}
    model = evidence.loaded.model
    batch_size = 0

    def observe(site: Site, inputs: Tensor) -> None:
        last = inputs.reshape(batch_size, -1, inputs.shape[-1])[:, -1]
        found[site.path].append(last.float().cpu())

    with torch.no_grad(), watch_inputs(model, evidence.profile, observe):
        for batch in tokens.batches():
            batch_size = len(batch)
            model(input_ids=batch.to(model.device), use_cache=False)
    return {path: torch.cat(parts) for path, parts in found.items()}


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]
