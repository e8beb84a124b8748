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
        judges_kv = any(dimension.name == "kv_bits" for dimension in dimensions)
        self.kv_tokens = kv_tokens if kv_tokens is not None else self._usual() if judges_kv else 0
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
        return 2.0 * len(self.profile.sites) if self._has("sparsity") else 0.0

    def size(self, settings: Tensor) -> Tensor:
        """Return the relaxed size, ``b`` float64, of ``b x d`` settings."""
        settings = settings.double()
        shares = self.shares(settings)
        zeros = torch.zeros(len(settings), len(self.profile.sites), dtype=torch.float64)
        for share in shares:
            zeros = zeros if share.weights is None else self._weights * (1 - share.weights)
        none = torch.zeros(1, dtype=torch.float64)
        way = next((s.weight_bits for s in shares if s.weight_bits is not None), none[:, None])
        sites = _between(way, [self._packed(zeros, k) for k in range(len(WEIGHT_BITS))])
        kv_way = next((s.kv_bits for s in shares if s.kv_bits is not None), none[:, None])
        kv = _between(kv_way, [row.expand(len(settings), -1) for row in self._kv])
        return self._outside_bytes + sites.sum(1) + self.kv_tokens * kv.sum(1)

    def size_of(self, values: Sequence[float]) -> int:
        """Return the exact size of a strategy."""
        return self.packed_bytes(values) + self.kv_bytes(values, self.kv_tokens)

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the tensor bytes of the variant's folder."""
        steps = self._steps(values)
        sites = torch.arange(len(steps))
        stored = self._codes[steps, sites] + self._scales[steps, sites]
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
        for share in self.shares(torch.tensor([values], dtype=torch.float64)):
            if share.kv_bits is not None:
                steps = (share.kv_bits[0] * (len(KV_BITS) - 1)).round().long()
                return tuple(KV_BITS[k] for k in steps.tolist())
        return (KV_BITS[0],) * len(self.profile.kv_heads)

    def _steps(self, values: Sequence[float]) -> Tensor:
        """Return every site's position in `WEIGHT_BITS`."""
        for share in self.shares(torch.tensor([values], dtype=torch.float64)):
            if share.weight_bits is not None:
                return (share.weight_bits[0] * (len(WEIGHT_BITS) - 1)).round().long()
        return torch.zeros(len(self.profile.sites), dtype=torch.long)

    def _packed_sites(self, values: Sequence[float]) -> Tensor:
        steps = self._steps(values)
        zeros = torch.tensor(self.shape(values).zeroed, dtype=torch.float64)
        packed = torch.stack([self._packed(zeros, k) for k in range(len(WEIGHT_BITS))])
        return packed[steps, torch.arange(len(steps))].ceil()

    def _packed(self, zeros: Tensor, k: int) -> Tensor:
        """Return ``... x i`` bytes of sites at the ``k``-th bits, ``zeros`` of their weights so."""
        kept = self._codes[k] * (1 - zeros / self._weights) + self._weights / 8
        return torch.minimum(kept, self._codes[k]) + self._scales[k]

    def _usual(self) -> int:
        context = self.profile.max_context
        each = context * int(self._kv[0].sum())
        return context * max(1, round(_KV_SHARE * self._site_bytes / each))

    def _has(self, name: str) -> bool:
        return any(dimension.name == name for dimension in self.dimensions)


def _between(way: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Return ``b x n`` values on the way along levels of the same shape, linear between two."""
    position = way * (len(levels) - 1)
    total = torch.zeros_like(levels[0])
    for k, level in enumerate(levels):
        total = total + (1 - (position - k).abs()).clamp(min=0) * level
    return total


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
