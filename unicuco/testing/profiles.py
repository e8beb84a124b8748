"""Profiles of models that do not exist: what space, costs and searches need, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from unicuco.types import ModelProfile, Site


def make_profile(
    blocks: Sequence[Sequence[tuple[int, int]]] = (((4, 6), (8, 3)), ((5, 5), (2, 9))),
    *,
    extra_params: int = 7,
    outside_params: int = 50,
) -> ModelProfile:
    """Return the profile of a model with these matrices.

    Args:
        blocks: per block the shapes ``(rows, columns)`` of its sites.
        extra_params: parameters of every block outside its sites.
        outside_params: parameters outside all blocks.
    """
    sites = tuple(
        Site(block=b, path=f"blocks.{b}.site_{k}", num_rows=rows, num_columns=columns)
        for b, shapes in enumerate(blocks)
        for k, (rows, columns) in enumerate(shapes)
    )
    block_params = tuple(
        extra_params + sum(site.num_weights for site in sites if site.block == b)
        for b in range(len(blocks))
    )
    total = outside_params + sum(block_params)
    return ModelProfile(
        digest="0" * 64,
        architecture="None",
        sites=sites,
        block_paths=tuple(f"blocks.{b}" for b in range(len(blocks))),
        block_params=block_params,
        block_bytes=tuple(2 * count for count in block_params),
        total_params=total,
        total_bytes=2 * total,
        vocabulary_size=16,
        max_context=32,
    )
