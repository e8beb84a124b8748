"""Profiles of models that do not exist: what space, costs and searches need, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from unicuco.types import ModelProfile, Part, Site


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
        Site(block=b, path=f"blocks.{b}.site_{k}", num_rows=rows, num_columns=columns, item_bytes=2)
        for b, shapes in enumerate(blocks)
        for k, (rows, columns) in enumerate(shapes)
    )
    block_params = tuple(
        extra_params + sum(site.num_weights for site in sites if site.block == b)
        for b in range(len(blocks))
    )
    total = outside_params + sum(block_params)
    parts = tuple(part for b in range(len(blocks)) for part in _parts(sites, b, extra_params))
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
        parts=parts,
        kv_heads=((2, 4),) * len(blocks),
    )


def _parts(sites: Sequence[Site], block: int, extra_params: int) -> list[Part]:
    """Divide a block: its first site with 2 extra parameters, and the others with the rest."""
    own = [site for site in sites if site.block == block]
    groups = [group for group in (own[:1], own[1:]) if group]
    extras = [2, extra_params - 2] if len(groups) == 2 else [extra_params]
    counts = [
        extra + sum(site.num_weights for site in group)
        for group, extra in zip(groups, extras, strict=True)
    ]
    return [
        Part(
            block=block,
            modules=(f"blocks.{block}.norm_{k}", f"blocks.{block}.part_{k}"),
            sites=tuple(site.path for site in group),
            num_params=count,
            num_bytes=2 * count,
            **_units(group),
        )
        for k, (group, count) in enumerate(zip(groups, counts, strict=True))
    ]


def _units(group: Sequence[Site]) -> dict[str, int]:
    """Make a part of as many units as its last matrix has columns, if the other rows divide so."""
    count = group[-1].num_columns
    if any(site.num_rows % count for site in group[:-1]):
        return {}
    params = sum(site.num_weights // count for site in group)
    return {"num_units": count, "unit_params": params, "unit_bytes": 2 * params}
