"""KV bits: 16, 8, 6 or 4 for the keys and values that a block caches. Weights stay as they are.

Judged by rounding keys and values as they enter the cache, every head of a token with a scale of
its own. An engine gets the nearest flag that it has (`unicuco.export.precision`).

What it does not know: how many tokens are cached; the cost model is told.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from unicuco.bits import KV_BITS
from unicuco.dimensions.base import Dimension, Granularity, Kept
from unicuco.errors import RequestError
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs

_STEPS: Final = len(KV_BITS) - 1
_POWER: Final = 6.0  # squared errors of 16 and 256 times from 8 to 6 and to 4 bits, roughly


class KvBits(Dimension):
    """One axis of three steps per block, at either granularity: 16, 8, 6, 4 bits."""

    name = "kv_bits"
    served_as = ServedAs.QUANTISED
    must_follow: frozenset[str] = frozenset({"depth", "width"})

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one axis per block.

        Raises:
            RequestError: the model keeps no cache of keys and values per block.
        """
        if not profile.kv_heads:
            raise RequestError(
                f"{profile.architecture} keeps no cache of keys and values for every block; "
                "leave kv_bits out of --dimensions"
            )
        return [
            Axis(
                name=f"{self.name}/block.{block}",
                low=0.0,
                high=1.0,
                num_steps=_STEPS,
                is_shape=True,
                power=_POWER,
            )
            for block in range(profile.num_blocks)
        ]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return every block's way from 16 to 4 bits."""
        return Kept(kv_bits=settings)
