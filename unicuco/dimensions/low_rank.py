"""Low rank: fewer coordinates inside every attention head (MoDeGPT's modules, arXiv 2408.09632).

Two axes per attention: rotary pairs of its queries and keys, and the rank of its values and
outputs; the same number in every head of a block. Heads keep their size inside attention, where
what is gone is zero, so engines run their own kernels: matrices are smaller and faster, attention
itself and the KV cache are not. The method's third module, the MLP's Nyström approximation, is
what `width` does to feed-forward channels.

What it does not know: which coordinates go (`unicuco.importance.modegpt`). Not with sparsity: the
drop order of values and outputs is of their old coordinates, and says nothing of the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions.base import Dimension, Granularity, Kept, grid_axis
from unicuco.errors import RequestError
from unicuco.space import Axis, Narrowing
from unicuco.types import ModelProfile, ServedAs

_MAX_STEPS: Final = 16


class LowRank(Dimension):
    """Two axes per attention: the share of pairs, and the share of ranks, that go."""

    name = "low_rank"
    served_as = ServedAs.SHRINK
    must_follow: frozenset[str] = frozenset({"depth", "width"})
    apart_from: frozenset[str] = frozenset({"sparsity"})
    narrows = True

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return the axes of every attention, at either granularity: pairs, then ranks.

        Raises:
            RequestError: there is no attention of a kind whose heads can be narrowed.
        """
        attentions = _attentions(profile)
        if not attentions:
            raise RequestError(
                f"the heads of {profile.architecture} can't be narrowed (those of Llama and Qwen2 "
                "models can); leave low_rank out of --dimensions; masks go with every family "
                "(--dimensions sparsity)"
            )
        return [
            grid_axis(f"{self.name}/{profile.parts[p].path}.{kind}", count)
            for p in attentions
            for kind, count in zip(("pairs", "ranks"), _steps(profile, p), strict=True)
        ]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return 1 - setting of the lines of the sites: queries and keys, values and outputs."""
        index = {site.path: position for position, site in enumerate(profile.sites)}
        sites = [index[path] for p in _attentions(profile) for path in profile.parts[p].sites]
        lines = torch.ones(len(settings), len(profile.sites), dtype=settings.dtype)
        shares = (1.0 - settings).repeat_interleave(2, dim=1)  # two sites per axis
        return Kept(lines=lines.index_copy(1, torch.tensor(sites), shares))

    def narrowed(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[int, Narrowing]:
        """Return whole steps of pairs and ranks."""
        lost = {}
        for k, p in enumerate(_attentions(profile)):
            size = profile.parts[p].head_size
            counts = _steps(profile, p)
            pairs, ranks = (
                round(value * count) * (whole // count)
                for value, count, whole in zip(
                    values[2 * k : 2 * k + 2], counts, (size // 2, size), strict=True
                )
            )
            lost[p] = Narrowing(pairs=pairs, ranks=ranks)
        return lost


def _attentions(profile: ModelProfile) -> list[int]:
    """Return the parts whose heads have at least two pairs."""
    return [
        p for p, part in enumerate(profile.parts) if part.head_size >= 4 and part.head_size % 2 == 0
    ]


def _steps(profile: ModelProfile, p: int) -> tuple[int, int]:
    """Return how many steps the pairs and the ranks of a part's heads have; few, if they divide."""
    size = profile.parts[p].head_size
    pairs, ranks = (
        next((n for n in range(min(whole, _MAX_STEPS), 1, -1) if whole % n == 0), whole)
        for whole in (size // 2, size)
    )
    return pairs, ranks
