"""`Pruner`: a site and how many weights it loses -> its matrix. Two kinds.

`RankPruner` zeroes weights in the order of the rank store (and a row rule), and leaves all others
as they are. `LevelPruner` picks matrices from a level database, whose other weights were updated.
Both drop exactly as many weights as they are told.

`build_levels` is how SparseGPT fills a database: one site, or several, at a time, in as many
processes as there are. Strategies that meet their budgets by levels (`StrategySpace`, its stride)
need nothing between two levels but for one site's remainder: at 0.6 that costs the reference model
a thirtieth of its KL, while sites that all lie between levels lose a third of what updates bring.

Notation: a site is ``o x i``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from unicuco.calibration import TokenSet
from unicuco.importance.hessian import collect_hessians
from unicuco.importance.sparsegpt import BLOCK_COLUMNS, DAMPING, InverseFactor, prune_with_update
from unicuco.levels import LevelDatabase, LevelPlan
from unicuco.models import read_site
from unicuco.ranks import cut
from unicuco.rows import RowRule
from unicuco.types import Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel


class Pruner(Protocol):
    """Turns a site's setting into its matrix."""

    def materialise(self, site: Site, num_dropped: int) -> Tensor:
        """Return the ``o x i`` matrix with exactly ``num_dropped`` weights dropped.

        Raises:
            ValueError: ``num_dropped`` is negative or more than the matrix holds.
        """


class RankPruner:
    """Zeroes in drop order.

    Args:
        weights: site path to dense ``o x i``.
        ranks: site path to drop order.
        rows: how a site's dropped weights are spread over its rows; none: equally.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        ranks: Mapping[str, Tensor],
        rows: RowRule | None = None,
    ) -> None:
        self._weights = weights
        self._ranks = ranks
        self._rows = rows

    def materialise(self, site: Site, num_dropped: int) -> Tensor:
        """Return the cut matrix; kept weights are the dense ones to the bit."""
        rows = None if self._rows is None else self._rows.of(site.path)
        return cut(self._weights[site.path], self._ranks[site.path], num_dropped, rows=rows)


class LevelPruner:
    """Picks levels; between two levels the lower one loses its smallest weights besides.

    Args:
        database: with the levels of every site that is asked for.
        weights: site path to dense ``o x i``, the level that is not stored.
    """

    def __init__(self, database: LevelDatabase, weights: Mapping[str, Tensor]) -> None:
        self._database = database
        self._weights = weights

    def materialise(self, site: Site, num_dropped: int) -> Tensor:
        """Return the nearest level's matrix with the rest of the count dropped by size.

        Raises:
            RunError: the level is missing or was altered.
        """
        if not 0 <= num_dropped <= site.num_weights:
            raise ValueError(f"num_dropped must be in [0, {site.num_weights}], got {num_dropped}")
        count = self._database.nearest_below(site, num_dropped)
        dense = self._weights[site.path]
        matrix = self._database.read(site, count).to(dense.device) if count else dense
        rest = num_dropped - count
        if not rest:
            return matrix.detach().clone()
        zeroed = matrix.detach().clone().contiguous().flatten()
        # Zeros are the first in this order and are counted already.
        order = zeroed.float().abs().argsort(stable=True)
        zeroed[order[:num_dropped]] = 0
        return zeroed.view(matrix.shape)


def sparsegpt_plan(
    loaded: LoadedModel, tokens: TokenSet, step: int, *, dtype: torch.dtype | None = None
) -> LevelPlan:
    """Return the plan of a SparseGPT database; its ``num_bytes`` is what to say beforehand.

    ``dtype`` is what levels are stored as; none: the type that the model is loaded as.
    """
    stored = "" if dtype is None else f" {dtype}"
    return LevelPlan(
        model_digest=loaded.profile.digest,
        data_digest=tokens.digest,
        method=f"sparsegpt damping={DAMPING:g} block={BLOCK_COLUMNS}{stored}",
        step=step,
    )


# Pruners whose sites come from a level database: name -> its plan.
LEVEL_PRUNERS: Final[dict[str, Callable[..., LevelPlan]]] = {"sparsegpt": sparsegpt_plan}


def build_levels(
    loaded: LoadedModel,
    tokens: TokenSet,
    folder: Path,
    plan: LevelPlan,
    *,
    sites: Sequence[Site] | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LevelDatabase:
    """Build what is missing of a SparseGPT database.

    Args:
        loaded: the dense model.
        tokens: the calibration text.
        folder: of the database.
        plan: of `sparsegpt_plan`.
        sites: only these, so that several processes can share the work; none: all.
        dtype: what levels are stored as; none: the type that the model is loaded as.
        progress: told after every site.

    Raises:
        ModelError: a site's inputs are NaN or infinite.
        RunError: the folder holds another database.
        StorageError: the disk refused; what is finished stays and is not made again.
    """
    database = LevelDatabase(folder, plan)
    wanted = loaded.profile.sites if sites is None else sites
    todo = [site for site in wanted if not database.has_site(site)]
    for block in sorted({site.block for site in todo}):  # one pass and one block's Hessians a time
        together = [site for site in todo if site.block == block]
        hessians = collect_hessians(loaded, together, tokens)
        for site in together:
            factor = InverseFactor.of(hessians.pop(site.path))
            weight = read_site(loaded.model, site)
            database.build_site(site, _maker(weight, factor, dtype or weight.dtype))
            progress(sum(map(database.has_site, wanted)), len(wanted))
    return database


def _maker(weight: Tensor, factor: InverseFactor, dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda count: prune_with_update(weight, factor, count).to(dtype)
