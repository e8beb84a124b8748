"""`ByteCost`: the cost model where dimensions change bits. A strategy's size is then bytes.

Three sizes of the weights, which agree where nothing is zero:

- ``num_bytes``: what a variant's folder stores, and an engine holds; zeros take their bits;
- ``packed_bytes``: what a lossless form needs at most. A site with zeros is a bit per weight that
  says where they are, and the other weights' bits; or as it is, if that is less;
- the size that budgets count: ``packed_bytes``, plus the keys and values of ``kv_tokens`` tokens.

Scales are counted everywhere. Between two numbers of bits the relaxed size is linear.

Notation: b batch, i sites, l blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.bits import KV_BITS, WEIGHT_BITS, code_bytes, kv_token_bytes, scale_bytes
from unicuco.dimensions.base import Dimension, Granularity, ProductCost
from unicuco.types import ModelProfile, ServedAs

_KV_SHARE: Final = 0.5  # of the sites' bytes: the cache that is learned with, in whole contexts


class ByteCost(ProductCost):
    """The cost of some dimensions, bits among them, in bytes.

    Args:
        profile: of the model.
        dimensions: sparsity, weight_bits, kv_bits or several of them.
        granularity: of their axes.
        kv_tokens: how many tokens' keys and values count; none: as many as make up half the sites'
            bytes where kv_bits is a dimension, and no token where it is not.
    """

    counts_bytes = True

    def __init__(
        self,
        profile: ModelProfile,
        dimensions: Sequence[Dimension],
        granularity: Granularity,
        kv_tokens: int | None = None,
    ) -> None:
        super().__init__(profile, dimensions, granularity)
        self._codes = _table([[code_bytes(s, bits) for s in profile.sites] for bits in WEIGHT_BITS])
        self._scales = _table(
            [[scale_bytes(s, bits) for s in profile.sites] for bits in WEIGHT_BITS]
        )
        self._kv = _table(
            [[kv_token_bytes(*heads, bits) for heads in profile.kv_heads] for bits in KV_BITS]
        )
        self._site_bytes = int(self._codes[0].sum())
        self._sites = torch.arange(len(profile.sites))
        self._zero_axis, self._bits_axis, self._kv_axis = self._axes()
        usual = 0 if self._kv_axis is None else self._usual()
        self.kv_tokens = usual if kv_tokens is None else kv_tokens
        kv = self.kv_tokens * int(self._kv[0].sum())
        self.total_size = profile.total_bytes + kv
        self.site_size = self._site_bytes + kv
        self._outside_bytes = profile.total_bytes - self._site_bytes

    @property
    def served_as(self) -> ServedAs:
        """Always quantised."""
        return ServedAs.QUANTISED

    @property
    def slack(self) -> float:
        """Bytes by which the relaxed size of a strategy may be less than the exact one."""
        return 0.0 if self._zero_axis is None else 2.0 * len(self._sites)

    def size(self, settings: Tensor) -> Tensor:
        """Return the relaxed size, ``b`` float64, of ``b x d`` settings."""
        settings = settings.double()
        none = settings.new_zeros(len(settings), 1)
        share = none if self._zero_axis is None else settings[:, self._zero_axis]
        levels = self._packed(share[:, None], self._codes, self._scales)
        way = none if self._bits_axis is None else settings[:, self._bits_axis]
        size = self._outside_bytes + _between(way, levels)
        if self.kv_tokens:
            way = none if self._kv_axis is None else settings[:, self._kv_axis]
            size = size + self.kv_tokens * _between(way, self._kv)
        return size

    def size_of(self, values: Sequence[float]) -> int:
        """Return the exact size of a strategy."""
        kv = self.kv_bytes(values, self.kv_tokens) if self.kv_tokens else 0
        return self.packed_bytes(values) + kv

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the tensor bytes of the variant's folder."""
        steps = self._steps(values)
        stored = self._codes[steps, self._sites] + self._scales[steps, self._sites]
        return self._outside_bytes + int(stored.sum())

    def packed_bytes(self, values: Sequence[float]) -> int:
        """Return the bytes of the weights where zeros take a bit."""
        return self._outside_bytes + int(self._packed_sites(values).sum())

    def site_losses(self, values: Sequence[float]) -> list[float]:
        """Return the share of its packed bytes that every site loses."""
        return (1 - self._packed_sites(values) / self._codes[0]).tolist()

    def kv_bytes(self, values: Sequence[float], tokens: int) -> int:
        """Return the bytes that the keys and values of so many tokens take."""
        bits = self.kv_bits(values)
        heads = self.profile.kv_heads
        each = sum(kv_token_bytes(*own, b) for own, b in zip(heads, bits, strict=True))
        return tokens * each

    def weight_bits(self, values: Sequence[float]) -> tuple[int, ...]:
        """Return the bits of every site."""
        return tuple(WEIGHT_BITS[k] for k in self._steps(values).tolist())

    def kv_bits(self, values: Sequence[float]) -> tuple[int, ...]:
        """Return the bits of what every block caches."""
        if self._kv_axis is None:
            return (KV_BITS[0],) * len(self.profile.kv_heads)
        last = len(KV_BITS) - 1
        return tuple(KV_BITS[round(values[axis] * last)] for axis in self._kv_axis.tolist())

    def _steps(self, values: Sequence[float]) -> Tensor:
        """Return every site's position in `WEIGHT_BITS`."""
        if self._bits_axis is None:
            return torch.zeros_like(self._sites)
        own = torch.tensor(values, dtype=torch.float64)[self._bits_axis]
        return (own * (len(WEIGHT_BITS) - 1)).round().long()

    def _packed_sites(self, values: Sequence[float]) -> Tensor:
        """Return the whole bytes of every site, ``i``."""
        steps = self._steps(values)
        share = torch.tensor(self.shape(values).zeroed, dtype=torch.float64) / self._weights
        codes, scales = self._codes[steps, self._sites], self._scales[steps, self._sites]
        return self._packed(share, codes, scales).ceil()

    def _packed(self, share: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Return ``... x i`` bytes of sites of which a ``share`` is zero."""
        return torch.minimum(codes * (1 - share) + self._weights / 8, codes) + scales

    def _axes(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the axis of every site's zeros and bits, and of every block's cache; or none.

        Dimensions only pick their settings for each: of numbered axes they pick the numbers.
        """
        count = sum(len(part.axes(self.profile, self.granularity)) for part in self.dimensions)
        zeros = bits = kv = None
        for kept in self.shares(torch.arange(count, dtype=torch.float64)[None]):
            if kept.weights is not None:
                zeros = (1 - kept.weights[0]).round().long()
            elif kept.weight_bits is not None:
                bits = kept.weight_bits[0].long()
            elif kept.kv_bits is not None:
                kv = kept.kv_bits[0].long()
        return zeros, bits, kv

    def _usual(self) -> int:
        context = self.profile.max_context
        each = context * int(self._kv[0].sum())
        return context * max(1, round(_KV_SHARE * self._site_bytes / each))


def _between(way: Tensor, levels: Tensor) -> Tensor:
    """Return the ``b`` totals of ``... x k x n`` levels, linear between two, at ``b x n`` ways."""
    position = way[:, None] * (levels.shape[-2] - 1)
    steps = torch.arange(levels.shape[-2], dtype=way.dtype)[:, None]
    near = (1 - (position - steps).abs()).clamp(min=0)
    return (near * levels).sum((1, 2))


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
