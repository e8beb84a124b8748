"""Weight bits: 16 (as stored), 8 or 4 for every matrix that an engine multiplies by. Quantised.

At granularity ``layer`` an axis is what engines run as one: the matrices of a part that read the
same input (queries, keys and values; gate and up) share their bits, and are named after the first
of them; the last matrix of a part, and every matrix where parts are not known, has its own. At
``block`` an axis is a block.

What it does not know: how a matrix is rounded (`unicuco.bits`), and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from torch import Tensor

from unicuco.bits import WEIGHT_BITS, round_inputs, site_bytes
from unicuco.dimensions.base import Dimension, Granularity, Kept
from unicuco.errors import RequestError
from unicuco.models import site_module
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs, Site

if TYPE_CHECKING:
    from torch import nn

_STEPS: Final = len(WEIGHT_BITS) - 1
_POWER: Final = 8.0  # four bits less are 256 times the squared error: 2^8 from half way to the end
_HOOK: Final = "_unicuco_input_hook"


class WeightBits(Dimension):
    """One axis of two steps per matrix group or block: 0 is 16 bits, 1/2 is 8, 1 is 4."""

    name = "weight_bits"
    served_as = ServedAs.QUANTISED
    must_follow: frozenset[str] = frozenset({"sparsity", "depth", "width"})

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one axis per group in site order.

        Raises:
            RequestError: matrices are stored the other way round, which no engine takes quantised.
        """
        if any(site.transposed for site in profile.sites):
            raise RequestError(
                f"{profile.architecture} stores its matrices transposed, and no engine loads such "
                "ones with fewer bits; leave weight_bits out of --dimensions"
            )
        return [
            Axis(
                name=f"{self.name}/{name}",
                low=0.0,
                high=_end(sites),
                num_steps=_STEPS,
                is_shape=True,
                power=_POWER,
            )
            for name, sites in _groups(profile, granularity)
        ]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return every site's way from 16 to 4 bits."""
        groups = _groups(profile, granularity)
        group_of = {site.path: g for g, (_, sites) in enumerate(groups) for site in sites}
        return Kept(weight_bits=settings[:, [group_of[site.path] for site in profile.sites]])

    def apply(
        self,
        model: nn.Module,
        profile: ModelProfile,
        values: Sequence[float],
        granularity: Granularity,
    ) -> None:
        """Round the inputs of what has 8 bits, as engines do, and those of nothing else."""
        for value, (_, sites) in zip(values, _groups(profile, granularity), strict=True):
            for site in sites:
                module = site_module(model, site)
                handle = module.__dict__.pop(_HOOK, None)
                if handle is not None:
                    handle.remove()
                if WEIGHT_BITS[round(value * _STEPS)] == 8:
                    module.__dict__[_HOOK] = round_inputs(module)


def _groups(profile: ModelProfile, granularity: Granularity) -> list[tuple[str, list[Site]]]:
    """Return (name, sites) of every axis."""
    if granularity is Granularity.BLOCK:
        return [
            (f"block.{block}", [site for site in profile.sites if site.block == block])
            for block in range(profile.num_blocks)
        ]
    together = [part.sites[:-1] for part in profile.parts] + [p.sites[-1:] for p in profile.parts]
    first = {path: paths[0] for paths in together for path in paths}
    groups: dict[str, list[Site]] = {}
    for site in profile.sites:
        groups.setdefault(first.get(site.path, site.path), []).append(site)
    return list(groups.items())


def _end(sites: Sequence[Site]) -> float:
    """Return the last setting that makes the sites smaller: of tiny ones 4 bits do not."""
    sizes = [sum(site_bytes(site, bits) for site in sites) for bits in WEIGHT_BITS]
    return 1.0 if sizes[2] < sizes[1] else 0.5
