"""`SiteWeights`: dense weights, drop order and Fisher sums of some sites; what is cut out of them.

What it does not know: the model that the sites belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unicuco.bits import round_matrix, scale_dtype
from unicuco.evaluate.rank_window import site_derivative
from unicuco.importance.units import UnitStore
from unicuco.levels import LevelDatabase
from unicuco.pruners import LevelPruner
from unicuco.ranks import cut, narrowed_rank
from unicuco.space import Narrowing
from unicuco.types import Part, Site


class SiteWeights:
    """The sites of one evaluator.

    Args:
        dense: site path -> the module's matrix, as it is stored, of any float dtype.
        ranks: site path -> ``o x i`` drop order within each row.
        fisher: site path -> ``i`` sums over rows of F w^2 / 2 at each rank.
        sites: which.
        levels: folder of the level database that sites are taken from instead of being cut; or "".
        units: which units of a part stay, where parts are narrowed.
        factors: site path -> what GPTQ rounds by; others are rounded to the nearest.
        biases: site path -> the module's bias, of sites that have one.
    """

    def __init__(
        self,
        dense: Mapping[str, Tensor],
        ranks: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        levels: str = "",
        units: UnitStore | None = None,
        factors: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._biases = biases or {}
        self._units = units
        self._factors = factors or {}
        self._dense = {site.path: oriented(dense[site.path], site) for site in sites}
        self._ranks = ranks
        self._fisher = fisher
        self._levels = LevelPruner(LevelDatabase(Path(levels)), self._dense) if levels else None

    @torch.no_grad()
    def cut(
        self, site: Site, num_dropped: int, target: Tensor, *, rows: Tensor | None = None
    ) -> None:
        """Write a site's matrix with its first ``num_dropped`` weights zeroed into ``target``.

        Args:
            site: which.
            num_dropped: weights.
            target: the live module's matrix, as it is stored.
            rows: the site's offsets of a row rule; none: rows drop equally.
        """
        out, path = oriented(target, site), site.path
        if self._levels is not None:
            out.copy_(self._levels.materialise(site, num_dropped))
        else:
            cut(self._dense[path], self._ranks[path], num_dropped, rows=rows, out=out)

    @torch.no_grad()
    def narrow(
        self, site: Site, part: Part, less: Narrowing, num_zeroed: int, target: Tensor
    ) -> None:
        """Write a site's narrowed matrix into ``target``, with zeros where it has nothing.

        Args:
            site: which.
            part: that it belongs to.
            less: what the part loses.
            num_zeroed: weights of what is left that become zero.
            target: the live module's matrix, as it is stored.
        """
        assert self._units is not None, "a narrowed part has units"
        dense = self._dense[site.path].float()
        rows, columns, matrix = self._units.narrowed(part, less, site, dense)
        if num_zeroed:
            rank = narrowed_rank(self._ranks[site.path], rows, columns)
            matrix = cut(matrix, rank, num_zeroed)
        out = oriented(target, site).zero_()
        if columns is not None:
            out[:, columns] = matrix.to(out.dtype)
        else:
            out[rows] = matrix.to(out.dtype)

    @torch.no_grad()
    def narrow_bias(self, site: Site, part: Part, less: Narrowing, target: Tensor) -> None:
        """Write a site's bias into ``target`` as `narrow` does its matrix; nothing lost: dense."""
        rows, bias = None, self._biases[site.path]
        if less:
            assert self._units is not None, "a narrowed part has units"
            rows, bias = self._units.narrowed_bias(part, less, site, bias)
        if rows is None:
            target.copy_(bias)
        else:
            target.zero_()[rows] = bias.to(target.dtype)

    @torch.no_grad()
    def quantise(self, site: Site, bits: int, target: Tensor) -> None:
        """Round what ``target`` holds to so many bits; zeros stay, and 16 bits change nothing.

        Args:
            site: which.
            bits: 16, 8 or 4.
            target: the live module's matrix, as it is stored.
        """
        if bits == 16:
            return
        matrix = oriented(target, site)
        upper = self._factors.get(site.path)
        matrix.copy_(round_matrix(matrix, bits, scale_dtype(site), upper=upper).dequantise())

    def slope(self, site: Site, gradient: Tensor | None, num_dropped: int) -> float:
        """Return dKL/ds of a site whose first ``num_dropped`` weights are gone.

        ``gradient`` is that of the mean-token KL to the live module's matrix, as it is stored.
        """
        assert gradient is not None, "gradients follow a run with derivatives"
        path = site.path
        return site_derivative(
            oriented(gradient, site),
            self._dense[path],
            self._ranks[path],
            num_dropped,
            self._fisher[path],
        )

    def slope_narrowed(
        self, site: Site, part: Part, less: Narrowing, gradient: Tensor | None, num_zeroed: int
    ) -> float:
        """Return dKL/ds of a narrowed site, of whose remaining weights ``num_zeroed`` are zero.

        Fisher sums are taken as if what went with the lines had been spread over all ranks.
        """
        assert gradient is not None, "gradients follow a run with derivatives"
        assert self._units is not None, "a narrowed part has units"
        dense = self._dense[site.path].float()
        rows, columns, matrix = self._units.narrowed(part, less, site, dense)
        own = oriented(gradient, site)
        own = own if rows is None else own[rows]
        own = own if columns is None else own[:, columns]
        sums, width = self._fisher[site.path], matrix.shape[1]
        places = torch.arange(width, device=sums.device) * len(sums) // width
        return site_derivative(
            own,
            matrix,
            narrowed_rank(self._ranks[site.path], rows, columns),
            num_zeroed,
            sums[places] * (len(matrix) / len(dense)),
        )

    @torch.no_grad()
    def curvature(self, site: Site, part: Part, change: Tensor) -> float:
        """Return the second-order change of the KL, in nats per token, of a part's last matrix.

        With M the second moment of its inputs and s the mean curvature to its outputs, that is
        s / 2 times the trace of D M D^T; s is what makes the diagonal of this, for the dense matrix
        itself, the Fisher sum over all its weights.

        Args:
            site: the part's last.
            part: which.
            change: D, as the module's matrix is stored.
        """
        assert self._units is not None, "a narrowed part has units"
        moment, dense = self._units.moments[part.path], self._dense[site.path].float()
        diagonal = float((moment.diagonal() * dense.square().sum(0)).sum())
        scale = float(self._fisher[site.path].sum()) / diagonal if diagonal else 0.0
        own = oriented(change, site).float()
        return scale * float(((own @ moment) * own).sum())

    @torch.no_grad()
    def reopen(
        self, site: Site, part: Part, less: Narrowing, target: Tensor, bias: Tensor | None
    ) -> None:
        """Give a narrowed site that feeds its part's last matrix the dense lines it has lost."""
        assert self._units is not None, "a narrowed part has units"
        rows, _ = self._units.kept_lines(part, less, site)
        assert rows is not None, "the last matrix of a part loses columns"
        live = [(oriented(target, site), self._dense[site.path])]
        if bias is not None:
            live.append((bias, self._biases[site.path]))
        for out, dense in live:
            kept = out[rows]
            out.copy_(dense)
            out[rows] = kept


def oriented(matrix: Tensor, site: Site) -> Tensor:
    """Return a module's matrix as the ``o x i`` view that everything else speaks of."""
    return matrix.T if site.transposed else matrix
