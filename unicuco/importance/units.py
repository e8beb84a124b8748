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

Heads that stay may lose coordinates too (`unicuco.importance.modegpt`): rotary pairs of queries and
keys are left out as units are, values and outputs are first turned to the basis in which the last
coordinates matter least.

Notation: u units, m columns of each, H ``i x i``; inside heads as in `unicuco.importance.modegpt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.importance.hessian import collect_hessians
from unicuco.importance.modegpt import damped, pair_order, stillness, value_bases
from unicuco.models import read_site, site_module
from unicuco.space import Narrowing
from unicuco.tensors import named_under
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
        pairs: attention path to ``g x d/2`` rotary pairs, the first to go first; where they may go.
        bases: likewise to the ``2 x g x d x d`` float32 change of basis of values and outputs.
    """

    orders: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    pairs: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)

    def kept(self, part: Part, num_removed: int) -> Tensor:
        """Return the units that stay, rising."""
        return self.orders[part.path][num_removed:].long().sort().values

    def kept_pairs(self, part: Part, less: Narrowing) -> Tensor:
        """Return the rotary pairs that stay in every group that stays, rising: ``g' x p``."""
        order = self.pairs[part.path].long()[self.kept(part, less.units)]
        return order[:, less.pairs :].sort(dim=1).values

    def kept_lines(
        self, part: Part, less: Narrowing, site: Site
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the rows, or of the last matrix the columns, of a site that stay; none: all."""
        if not less:
            return None, None
        is_last = site.path == part.sites[-1]
        size = site.num_columns if is_last else site.num_rows
        lines = unit_indices(self.kept(part, less.units), part.num_units, size)
        if part.head_size:
            inside = self._inside(part, less, part.sites.index(site.path))
            starts = lines.view(len(inside), -1, part.head_size)[:, :, :1]  # (g', m, 1)
            lines = (starts + inside[:, None]).flatten()
        return (None, lines) if is_last else (lines, None)

    def narrowed(
        self, part: Part, less: Narrowing, site: Site, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return rows and columns as `kept_lines` does, and the site's matrix with those alone.

        Where values lose coordinates, the lines are those of the new basis, of which the first of
        every head stay.

        Args:
            part: which.
            less: what goes.
            site: one of its matrices.
            weight: the dense ``o x i``.
        """
        rows, columns = self.kept_lines(part, less, site)
        if columns is not None:
            return rows, columns, self._last(part, less, weight)
        if rows is None:
            return rows, columns, weight
        if less.ranks and site.path == part.sites[2]:
            values = weight.double().unflatten(0, (part.num_units, part.head_size))  # (g, d, i)
            turned = self.bases[part.path][0].double() @ values
            return rows, columns, turned.flatten(0, 1)[rows].to(weight.dtype)
        return rows, columns, weight[rows]

    def narrowed_bias(
        self, part: Part, less: Narrowing, site: Site, bias: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return the rows of a site that stay, none being all, and its ``o`` biases for them."""
        if site.path == part.sites[-1]:
            return None, bias
        rows, _, column = self.narrowed(part, less, site, bias[:, None])
        return rows, column[:, 0]

    def _inside(self, part: Part, less: Narrowing, position: int) -> Tensor:
        """Return the coordinates that stay in the heads of every group that stays, ``g' x n``."""
        groups = part.num_units - less.units
        if position < 2 and less.pairs:
            pairs = self.kept_pairs(part, less)
            return torch.cat([pairs, pairs + part.head_size // 2], dim=1)
        size = part.head_size - (less.ranks if position >= 2 else 0)
        return torch.arange(size, device=self.orders[part.path].device).expand(groups, -1)

    def _last(self, part: Part, less: Narrowing, weight: Tensor) -> Tensor:
        matrix = self.last_matrix(part, less.units, weight)
        if not less.ranks:
            return matrix
        kept = self.kept(part, less.units)
        heads = matrix.double().unflatten(1, (len(kept), -1, part.head_size))  # (o, g', m, d)
        basis = self.bases[part.path][1].double()[kept, :, : part.head_size - less.ranks]
        return torch.einsum("ogmd,gdr->ogmr", heads, basis).flatten(1).to(weight.dtype)

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
        return fit_columns(weight, self.moments[part.path], columns)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything `from_tensors` needs, by name."""
        named = {f"order/{path}": order.int() for path, order in self.orders.items()}
        named |= {f"moments/{path}": m.float() for path, m in self.moments.items()}
        named |= {f"pairs/{path}": order.int() for path, order in self.pairs.items()}
        return named | {f"bases/{path}": basis.float() for path, basis in self.bases.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> UnitStore:
        """Take named tensors; others among them are left alone."""
        kinds = ("order/", "moments/", "pairs/", "bases/")
        return cls(*(named_under(kind, tensors) for kind in kinds))


def build_units(loaded: LoadedModel, tokens: TokenSet, *, inside_heads: bool = False) -> UnitStore:
    """Run the text through the dense model and order the units of every part.

    Args:
        loaded: the dense model.
        tokens: the text.
        inside_heads: also order what is inside attention heads, which takes another pass.

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
    inside = order_inside_heads(loaded, tokens) if inside_heads else ({}, {})
    return UnitStore(orders, moments, *inside)


def order_inside_heads(
    loaded: LoadedModel, tokens: TokenSet, *, published: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the pairs and the bases of every attention (`UnitStore`).

    Args:
        loaded: the dense model.
        tokens: the text.
        published: order pairs as MoDeGPT does, whatever keys have in common.
    """
    by_path = {site.path: site for site in loaded.profile.sites}
    attentions = [part for part in loaded.profile.parts if part.head_size]
    first = [by_path[part.sites[0]] for part in attentions]  # all three read the same
    hessians = collect_hessians(loaded, first, tokens, with_constant=True)
    pairs: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    for part in attentions:
        moment = hessians.pop(part.sites[0]) / 2
        query, key, value = (_with_bias(loaded, by_path[path]) for path in part.sites[:3])
        output = read_site(loaded.model, by_path[part.sites[3]])
        turns = None if published else _stillness(loaded, part, tokens.context)
        pairs[part.path] = pair_order(query, key, moment, part.num_units, still=turns)
        bases[part.path] = value_bases(value, output, moment, part.num_units)
    return pairs, bases


def _stillness(loaded: LoadedModel, part: Part, context: int) -> Tensor:
    """Return what of a constant key rotary embedding leaves constant, by the model's own turns."""
    frequencies = next(
        buffer
        for name, buffer in loaded.model.named_buffers()
        if name.endswith("inv_freq") and len(buffer) == part.head_size // 2
    )
    return stillness(frequencies, context)


def _with_bias(loaded: LoadedModel, site: Site) -> Tensor:
    """Return a site's matrix with its bias, or zeros, as one more column."""
    weight = read_site(loaded.model, site)
    bias = site_module(loaded.model, site).bias
    column = torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias).detach()
    return torch.cat([weight.float(), column[:, None].float()], dim=1)


def last_sites(profile: ModelProfile) -> dict[str, str]:
    """Return the path of the last matrix of every part that can be narrowed, by part path."""
    return {part.path: part.sites[-1] for part in profile.parts if part.num_units}


def unit_indices(units: Tensor, num_units: int, size: int) -> Tensor:
    """Return the rows or columns, out of ``size``, that some units own, in the units' order."""
    each = size // num_units
    return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()


def fit_columns(weight: Tensor, moment: Tensor, columns: Tensor) -> Tensor:
    """Return the ``o x i'`` matrix of some columns fitted to the outputs of all.

    Args:
        weight: ``o x i``.
        moment: ``i x i`` second moments of its inputs.
        columns: ``i'`` that stay.
    """
    ridged = damped(moment, _DAMPING)
    factor = torch.linalg.cholesky(ridged[columns][:, columns])
    target = ridged[columns] @ weight.double().T  # (i', o)
    return torch.cholesky_solve(target, factor).T.to(weight.dtype)


@torch.no_grad()
def elimination_order(weight: Tensor, moment: Tensor, num_units: int) -> Tensor:
    """Return the ``u`` units in the order in which they go.

    Args:
        weight: ``o x i`` last matrix.
        moment: ``i x i`` second moments of its inputs.
        num_units: u, a divisor of i.
    """
    w = weight.double().clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, _DAMPING)))
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
