"""Which units of a part go first, and what those that stay make up for (structured least squares).

A part's units are feed-forward channels, or key and value heads with their query heads; what they
compute meets in the part's last matrix W, ``o x i``, each unit writing into m neighbouring columns.
With H the second moment of that matrix' inputs on calibration text, damped, removing columns R and
letting the others S answer for them costs tr(W_R [(H^-1)_RR]^-1 W_R^T) at least, by

    W_S' = W H_:S (H_SS)^-1,

the least-squares fit of the dense outputs (the optimal brain surgeon's update, for units; Hassibi
and Stork 1993). Units go one by one, the cheapest of those that are left first, W and H^-1 updated
after each: so the units that stay with fewer are among those that stay with more. In parts of very
many units several go at a time.

Notation: u units, m columns of each, H ``i x i``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.importance.hessian import collect_hessians
from unicuco.models import read_site
from unicuco.types import ModelProfile, Part, Site

if TYPE_CHECKING:
    from unicuco.calibration import TokenSet
    from unicuco.models import LoadedModel

UNITS: Final = "units.safetensors"  # of a run folder
_DAMPING: Final = 0.01  # of the mean diagonal; as SparseGPT's
_MAX_ROUNDS: Final = 1024  # of elimination; a part of more units loses several in each


@dataclass(frozen=True, slots=True)
class UnitStore:
    """For every part that can be narrowed: the order its units go in, and its inputs' moments.

    Attributes:
        orders: part path to ``u`` unit numbers, the first to go first.
        moments: part path to the ``i x i`` float32 second moments of its last matrix' inputs.
    """

    orders: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    def kept(self, part: Part, num_removed: int) -> Tensor:
        """Return the units that stay, rising."""
        return self.orders[part.path][num_removed:].long().sort().values

    def kept_lines(
        self, part: Part, num_removed: int, site: Site
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the rows, or of the last matrix the columns, of a site that stay; none: all."""
        if not num_removed:
            return None, None
        kept = self.kept(part, num_removed)
        if site.path == part.sites[-1]:
            return None, unit_indices(kept, part.num_units, site.num_columns)
        return unit_indices(kept, part.num_units, site.num_rows), None

    def narrowed(
        self, part: Part, num_removed: int, site: Site, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return rows and columns as `kept_lines` does, and the site's matrix with those alone.

        Args:
            part: which.
            num_removed: units that go.
            site: one of its matrices.
            weight: the dense ``o x i``.
        """
        rows, columns = self.kept_lines(part, num_removed, site)
        if columns is not None:
            return rows, columns, self.last_matrix(part, num_removed, weight)
        return rows, columns, weight if rows is None else weight[rows]

    def last_matrix(self, part: Part, num_removed: int, weight: Tensor) -> Tensor:
        """Return the ``o x i'`` last matrix of what stays, fitted to the dense one's outputs.

        Args:
            part: which.
            num_removed: units that go.
            weight: the dense ``o x i``.
        """
        if not num_removed:
            return weight
        columns = unit_indices(self.kept(part, num_removed), part.num_units, weight.shape[1])
        damped = _damped(self.moments[part.path])
        factor = torch.linalg.cholesky(damped[columns][:, columns])
        target = damped[columns] @ weight.double().T  # (i', o)
        return torch.cholesky_solve(target, factor).T.to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything `from_tensors` needs, by name."""
        named = {f"order/{path}": order.int() for path, order in self.orders.items()}
        return named | {f"moments/{path}": m.float() for path, m in self.moments.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UnitStore:
        """Take named tensors; others among them are left alone."""

        def of(kind: str) -> dict[str, Tensor]:
            return {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}

        return cls(of("order/"), of("moments/"))


def build_units(loaded: LoadedModel, tokens: TokenSet) -> UnitStore:
    """Run the text through the dense model and order the units of every part.

    Raises:
        ModelError: inputs are NaN or infinite.
    """
    profile = loaded.profile
    orders: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    last = last_sites(profile)
    sites = [site for site in profile.sites if site.path in last.values()]
    hessians = collect_hessians(loaded, sites, tokens)
    by_path = {site.path: site for site in sites}
    for part in profile.parts:
        if part.num_units:
            moment = hessians.pop(last[part.path]) / 2
            weight = read_site(loaded.model, by_path[last[part.path]])
            orders[part.path] = elimination_order(weight, moment, part.num_units)
            moments[part.path] = moment
    return UnitStore(orders, moments)


def last_sites(profile: ModelProfile) -> dict[str, str]:
    """Return the path of the last matrix of every part that can be narrowed, by part path."""
    return {part.path: part.sites[-1] for part in profile.parts if part.num_units}


def unit_indices(units: Tensor, num_units: int, size: int) -> Tensor:
    """Return the rows or columns, out of ``size``, that some units own, in the units' order."""
    each = size // num_units
    return (units[:, None] * each + torch.arange(each)).flatten()


@torch.no_grad()
def elimination_order(weight: Tensor, moment: Tensor, num_units: int) -> Tensor:
    """Return the ``u`` units in the order in which they go.

    Args:
        weight: ``o x i`` last matrix.
        moment: ``i x i`` second moments of its inputs.
        num_units: u, a divisor of i.
    """
    w = weight.double().clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(moment)))
    left = torch.arange(num_units)
    at_once = -(-num_units // _MAX_ROUNDS)
    order: list[Tensor] = []
    while len(left) > 1:
        costs = _costs(w, inverse, left, num_units)
        going = left[costs.argsort(stable=True)[: min(at_once, len(left) - 1)]]
        order.append(going)
        left = left[~torch.isin(left, going)]
        columns = unit_indices(going, num_units, w.shape[1])
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (r, i)
        w -= w[:, columns] @ solved
        inverse -= inverse[:, columns] @ solved
        w[:, columns] = 0.0
    return torch.cat([*order, left])


def _costs(w: Tensor, inverse: Tensor, units: Tensor, num_units: int) -> Tensor:
    """Return what removing each of some units alone costs now."""
    size = w.shape[1] // num_units
    if size == 1:
        return w[:, units].square().sum(0) / inverse.diagonal()[units]
    costs: Sequence[Tensor] = [
        (w[:, c] * torch.linalg.solve(inverse[c][:, c], w[:, c].T).T).sum()
        for c in (unit_indices(u[None], num_units, w.shape[1]) for u in units)
    ]
    return torch.stack(list(costs))


def _damped(moment: Tensor) -> Tensor:
    moment = moment.double()
    added = _DAMPING * float(moment.diagonal().mean()) or 1.0  # a part that is never active
    return moment + added * torch.eye(len(moment), dtype=torch.float64)
