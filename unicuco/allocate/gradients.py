"""Inner products of every item's own gradients, block by block: what influence functions need.

Per-item gradients of a linear map follow from its inputs and its outputs' gradients, and a batch
keeps items apart. So one backward pass over the items gives them for as many blocks as fit in
memory at a time.

Notation: n training and m validation items of t tokens, o x i a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from unicuco.calibration import TokenSet
from unicuco.errors import AllocationError
from unicuco.importance.influence import gradient_products
from unicuco.models import site_module
from unicuco.types import Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel

_ITEMS_PER_PASS: Final = 16
MEMORY_BYTES: Final = 1 << 30  # for inputs and gradients of the blocks that are watched at a time

_Watched = dict[str, tuple[list[Tensor], list[Tensor]]]


def block_products(
    loaded: LoadedModel,
    train: TokenSet,
    validation: TokenSet,
    *,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every block's inner products in order.

    Args:
        loaded: the dense model; left as it was.
        train: ``n x t`` items.
        validation: ``m x t`` items of the same length.
        memory_bytes: what inputs and gradients may take; more means fewer passes.

    Yields:
        ``n x n`` products of training items, ``n`` with the sum over validation items; float64.

    Raises:
        AllocationError: one block alone needs more memory.
    """
    ids = torch.cat([train.ids, validation.ids])
    for blocks in _groups(loaded, ids, memory_bytes):
        sites = [site for site in loaded.profile.sites if site.block in blocks]
        watched = _run(loaded.model, sites, ids)
        for block in blocks:
            gram = torch.zeros(len(train.ids), len(train.ids), dtype=torch.float64)
            cross = torch.zeros(len(train.ids), dtype=torch.float64)
            for site in sites:
                if site.block == block:
                    inputs, gradients = watched.pop(site.path)
                    parts = gradient_products(
                        torch.cat(inputs), torch.cat(gradients), len(train.ids)
                    )
                    gram, cross = gram + parts[0], cross + parts[1]
            yield gram, cross


def _groups(loaded: LoadedModel, ids: Tensor, memory_bytes: int) -> list[list[int]]:
    """Return which blocks are watched together."""
    needs = [0] * loaded.profile.num_blocks
    for site in loaded.profile.sites:
        needs[site.block] += 4 * ids.numel() * (site.num_rows + site.num_columns)
    if max(needs) > memory_bytes:
        raise AllocationError(
            f"gradients of one block on {len(ids)} items of {ids.shape[1]} tokens need "
            f"{max(needs) / 2**30:.1f} GiB, and {memory_bytes / 2**30:.1f} are allowed; "
            "take fewer or shorter items"
        )
    groups: list[list[int]] = [[]]
    used = 0
    for block, need in enumerate(needs):
        if groups[-1] and used + need > memory_bytes:
            groups.append([])
            used = 0
        groups[-1].append(block)
        used += need
    return groups


def _run(model: nn.Module, sites: Sequence[Site], ids: Tensor) -> _Watched:
    """Run all items forward and backward; site path -> inputs and output gradients, in order."""
    watched: _Watched = {site.path: ([], []) for site in sites}
    with _watching(model, sites, watched), torch.enable_grad():
        for items in ids.split(_ITEMS_PER_PASS):
            embedded = model.get_input_embeddings()(items).detach().requires_grad_(True)  # type: ignore[operator]
            logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), items[:, 1:].flatten(), reduction="sum"
            )
            # The sum over items: outputs of different items never meet, so gradients stay apart.
            (losses / (items.shape[1] - 1)).backward()
    return watched


@contextmanager
def _watching(model: nn.Module, sites: Sequence[Site], watched: _Watched) -> Iterator[None]:
    with ExitStack() as hooks:
        for site in sites:
            handle = site_module(model, site).register_forward_hook(_watch(*watched[site.path]))
            hooks.callback(handle.remove)
        yield


def _watch(
    inputs: list[Tensor], gradients: list[Tensor]
) -> Callable[[nn.Module, Any, Tensor], None]:  # Any: a module's positional inputs
    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        inputs.append(arguments[0].detach().float())
        output.register_hook(lambda gradient: gradients.append(gradient.detach().float()))

    return hook
