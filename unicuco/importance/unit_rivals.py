"""Unit stores of rivals, to narrow by what they would: MoDeGPT, and plain slicing by magnitude.

Both cut with the same code as our own (`unicuco.importance.units`); what they know differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unicuco.importance.modegpt import leverage_order
from unicuco.importance.units import UnitStore, order_inside_heads
from unicuco.models import read_site
from unicuco.types import Part

if TYPE_CHECKING:
    from unicuco.calibration import TokenSet
    from unicuco.models import LoadedModel


def modegpt_units(loaded: LoadedModel, tokens: TokenSet, units: UnitStore) -> UnitStore:
    """Return units with channels and pairs in MoDeGPT's orders.

    Args:
        loaded: the dense model.
        tokens: the calibration text.
        units: of its parts, of the same text.
    """
    channels = {
        part.path: leverage_order(units.moments[part.path])
        for part in loaded.profile.parts
        if part.num_units and not part.head_size
    }
    inside = order_inside_heads(loaded, tokens, published=True)
    return UnitStore({**units.orders, **channels}, units.moments, *inside)


def sliced_units(loaded: LoadedModel) -> UnitStore:
    """Return units that go by the norm of their weights, and that nothing makes up for."""
    orders: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    pairs: dict[str, Tensor] = {}
    bases: dict[str, Tensor] = {}
    for part in loaded.profile.parts:
        if not part.num_units:
            continue
        energies = _line_energies(loaded, part)
        whole = sum(energy.view(part.num_units, -1).sum(1) for energy in energies)
        assert isinstance(whole, Tensor)
        orders[part.path] = whole.argsort(stable=True)
        moments[part.path] = torch.eye(len(energies[-1]))  # uncorrelated inputs: no other helps
        if part.head_size:
            heads = [e.view(part.num_units, -1, part.head_size).sum(1) for e in energies]  # (g, d)
            halves = (heads[0] + heads[1]).view(part.num_units, 2, -1).sum(1)
            pairs[part.path] = halves.argsort(dim=1, stable=True)
            best = (heads[2] + heads[3]).argsort(dim=1, descending=True, stable=True)
            picked = torch.eye(part.head_size)[best]  # (g, d, d): sorts coordinates
            bases[part.path] = torch.stack([picked, picked.transpose(1, 2)])
    return UnitStore(orders, moments, pairs, bases)


def _line_energies(loaded: LoadedModel, part: Part) -> list[Tensor]:
    """Return the squared norms of every site's rows, of the last one's columns."""
    by_path = {site.path: site for site in loaded.profile.sites}
    matrices = [read_site(loaded.model, by_path[path]).float() for path in part.sites]
    return [*(m.square().sum(1) for m in matrices[:-1]), matrices[-1].square().sum(0)]
