"""Finds in every block what is added to the residual stream: its attention and its MLP.

By structure, not by names: of a block's direct children in the order in which they run, those that
hold sites are parts, neighbouring ones that are sites themselves (OPT's two matrices) being one;
what holds other parameters and runs before a part is its norm. That nothing else is in the block is
checked by what it does: with all parts silent, every block must pass its input on to the bit.
Anything else (norms behind a part, one norm for two parts) has no parts, and its blocks can then be
removed as a whole only.

A part can be narrowed where its matrices are of equal units: the feed-forward channels of a gated
MLP, and the key and value heads of grouped attention with their query heads. Whether they are is
read off the configuration of the two families that narrowed variants can be written for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unicuco.models.access import silence
from unicuco.models.block_shapes import SHRUNK_NAMES
from unicuco.types import Part, Site


def find_parts(
    model: nn.Module,
    block_paths: Sequence[str],
    sites: Sequence[Site],
    run: Callable[[], object],
) -> tuple[Part, ...]:
    """Return the parts of all blocks, or none.

    Args:
        model: with real weights, in eval mode.
        block_paths: of its blocks.
        sites: of its blocks.
        run: runs the model once, on a few tokens; done twice.
    """
    order = _child_order(model, block_paths, run)
    parts: list[Part] = []
    for block, path in enumerate(block_paths):
        own = [site for site in sites if site.block == block]
        found = _block_parts(model, path, own, order[block])
        if found is None:
            return ()
        parts += found
    if not _blocks_pass_on(model, block_paths, parts, run):
        return ()
    items = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    # Any: a configuration is of any family.
    config: Any = getattr(model, "config", None)
    units = [_units(type(model).__name__, config, part, sites) for part in parts]
    parts = [
        replace(part, num_units=count, head_size=size)
        for part, (count, size) in zip(parts, units, strict=True)
    ]
    return count_parts(parts, sites, model, items)


def count_parts(
    parts: Sequence[Part], sites: Sequence[Site], model: nn.Module, item_bytes: dict[str, int]
) -> tuple[Part, ...]:
    """Return the parts with parameters and bytes counted.

    Args:
        parts: to count.
        sites: of the model.
        model: that they were found in.
        item_bytes: parameter name -> bytes of one stored weight; tied ones under one name.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    by_path = {site.path: site for site in sites}
    counted = []
    for part in parts:
        names = [n for n in sizes if any(n.startswith(f"{path}.") for path in part.modules)]
        part = replace(
            part,
            num_params=sum(sizes[name] for name in names),
            num_bytes=sum(sizes[name] * item_bytes[name] for name in names),
        )
        counted.append(_count_units(part, by_path, sizes, item_bytes) if part.num_units else part)
    return tuple(counted)


def _count_units(
    part: Part, sites: dict[str, Site], sizes: dict[str, int], item_bytes: dict[str, int]
) -> Part:
    params = biases = num_bytes = 0
    for position, path in enumerate(part.sites):
        weights = sites[path].num_weights // part.num_units
        params += weights
        num_bytes += weights * item_bytes[f"{path}.weight"]
        bias = f"{path}.bias"
        if bias in sizes and position < len(part.sites) - 1:  # the last one's is of the stream
            count = sizes[bias] // part.num_units
            biases += count
            num_bytes += count * item_bytes[bias]
    return replace(part, unit_params=params + biases, unit_biases=biases, unit_bytes=num_bytes)


def _child_order(
    model: nn.Module, block_paths: Sequence[str], run: Callable[[], object]
) -> list[list[str]]:
    """Return the names of every block's direct children in the order in which they begin to run."""
    order: list[list[str]] = [[] for _ in block_paths]
    with ExitStack() as hooks:
        for block, path in enumerate(block_paths):
            for name, child in model.get_submodule(path).named_children():

                def note(_module: nn.Module, _args: Any, block: int = block, n: str = name) -> None:
                    if n not in order[block]:
                        order[block].append(n)

                hooks.callback(child.register_forward_pre_hook(note).remove)
        run()
    return order


def _block_parts(
    model: nn.Module, path: str, sites: Sequence[Site], order: Sequence[str]
) -> list[Part] | None:
    block = model.get_submodule(path)
    norms: list[str] = []
    groups: list[tuple[list[str], list[str], list[str]]] = []  # (norms, modules, sites) of a part
    was_site = False
    for name in order:
        child = f"{path}.{name}"
        inside = [s.path for s in sites if s.path == child or s.path.startswith(f"{child}.")]
        has_params = any(True for _ in block.get_submodule(name).parameters())
        if inside:
            is_site = inside == [child]
            if is_site and was_site and not norms:
                groups[-1][1].append(child)
                groups[-1][2].extend(inside)
            else:
                groups.append((norms, [child], inside))
                norms = []
            was_site = is_site
        elif has_params:
            norms.append(child)
    names = [module for group in groups for module in (*group[0], *group[1])]
    counted = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    everything = sum(p.numel() for p in block.parameters())
    if norms or counted != everything or not all(group[0] for group in groups):
        return None
    return [
        Part(
            block=sites[0].block,
            modules=(*before, *modules),
            sites=tuple(inside),
            num_params=0,
            num_bytes=0,
        )
        for before, modules, inside in groups
    ]


def _blocks_pass_on(
    model: nn.Module, block_paths: Sequence[str], parts: Sequence[Part], run: Callable[[], object]
) -> bool:
    """Say whether every block is the identity while all parts are silent."""
    same: list[bool] = []

    def compare(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        same.append(isinstance(given, Tensor) and torch.equal(given, result))

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(silence(model.get_submodule(part.path)).remove)
        for path in block_paths:
            block = model.get_submodule(path)
            hooks.callback(block.register_forward_hook(compare, with_kwargs=True).remove)
        run()
    return bool(same) and all(same)


# Any: a configuration is of any family.
def _units(architecture: str, config: Any, part: Part, sites: Sequence[Site]) -> tuple[int, int]:
    """Return how many equal units a part has, 0 where it can't be narrowed, and its heads' size."""
    if architecture not in SHRUNK_NAMES:
        return 0, 0
    own = [next(site for site in sites if site.path == path) for path in part.sites]
    rows = [site.num_rows for site in own[:-1]]
    columns = own[-1].num_columns
    if len(own) == 3 and set(rows) == {columns}:
        return columns, 0
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    wanted = [heads * head_dim, groups * head_dim, groups * head_dim]
    fits = rows == wanted and columns == wanted[0]
    return (int(groups), int(head_dim)) if fits else (0, 0)
