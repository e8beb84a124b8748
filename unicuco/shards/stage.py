"""`Stage`: a contiguous range of a model's blocks, run on strategies forward and backward.

A stage reads its own tensors from the model's files and no others: its blocks, with the first range
what embeds tokens, with the last what makes logits. Dense weights stay as they are stored, on the
skeleton's device; a block is cut into one block's worth of memory there, used for all windows of
the text, and forgotten, so that a stage never holds a second copy of its weights.

Going backward, a block is run again from what it received, with gradients, one window at a time;
kept are only what the blocks received. The gradient of a matrix lives until its slope is read off
it, block by block.

What it does not know: strategies, KL, and the other stages.

Notation: n windows of t tokens, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unicuco.errors import ModelError
from unicuco.evaluate.sites import SiteWeights
from unicuco.models import site_module
from unicuco.models.reading import TensorReader
from unicuco.shards.skeleton import Skeleton
from unicuco.types import ModelProfile, Site

# Site path -> weights that it loses.
Drops = Mapping[str, int]


class Stage:
    """One range of blocks.

    Args:
        skeleton: of the model; stages may share it one after the other (`close`).
        blocks: the range, not empty.
        reader: of the model's folder.
        ends: whether to hold what embeds tokens or makes logits, where the range is at that end.

    Raises:
        ModelError: a tensor is missing, broken or shared between stages, or the family can't be
            taken apart.
    """

    def __init__(
        self, skeleton: Skeleton, blocks: range, reader: TensorReader, *, ends: bool = True
    ) -> None:
        self.blocks = blocks
        self.skeleton = skeleton
        profile = skeleton.profile
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == profile.num_blocks
        self.sites = tuple(site for site in profile.sites if site.block in blocks)
        self._ends = ends
        self._weights: SiteWeights | None = None
        self._buffers: dict[tuple[int, torch.Size], Tensor] = {}
        self._replaced: dict[str, Tensor] = {}
        self.dense = self._read(profile, reader)

    def close(self) -> None:
        """Give the stage's memory back and leave the skeleton as it was."""
        for name, empty in self._replaced.items():
            self.skeleton.place(name, empty)
        self._replaced.clear()
        self._buffers.clear()
        self.dense.clear()

    @property
    def outer_bytes(self) -> int:
        """Memory of all that is the stage's besides its sites' matrices."""
        return sum(p.nbytes for p in self.skeleton.model.parameters() if _has_memory(p))

    def use(self, weights: SiteWeights) -> None:
        """Take what blocks are cut from; until then only the dense blocks can run."""
        self._weights = weights

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the first block receives, ``n x t x h``, for ``n x t`` tokens."""
        return torch.cat([self.skeleton.embed(window) for window in ids.split(1)])

    @torch.no_grad()
    def forward(
        self, drops: Drops | None, hidden: Tensor, received: list[Tensor] | None = None
    ) -> Tensor:
        """Run the blocks.

        Args:
            drops: what every site of the stage loses; none: the dense blocks.
            hidden: ``n x t x h`` that the first of them receives.
            received: gets what each block received; none: kept nowhere.

        Returns:
            ``n x t x h``, the last block's output.
        """
        for block in self.blocks:
            if received is not None:
                received.append(hidden)
            with self.loaded(block, drops):
                windows = [self.skeleton.run_block(block, window) for window in hidden.split(1)]
            hidden = torch.cat(windows)
        return hidden

    def backward(
        self,
        drops: Drops,
        received: Sequence[Tensor],
        gradient: Tensor,
        groups: Sequence[range],
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """Run the blocks again and go back through them, last first.

        Args:
            drops: what every site of the stage loses.
            received: what each block received, as `forward` left it.
            gradient: ``n x t x h`` with respect to the last block's output.
            groups: windows whose slopes are told apart.

        Returns:
            The gradient with respect to what the first of the blocks received, and each group's
            slope by site path.
        """
        gradient = gradient.clone()
        slopes: list[dict[str, float]] = [{} for _ in groups]
        for block, hidden in zip(reversed(self.blocks), reversed(received), strict=True):
            sites = [site for site in self.sites if site.block == block]
            with self.loaded(block, drops):
                for group, own in zip(groups, slopes, strict=True):
                    for weight in map(self._live, sites):
                        weight.requires_grad_(True)
                        weight.grad = None
                    for window in group:
                        self.back_through(block, hidden, gradient, window)
                    for site in sites:
                        own[site.path] = self._slope(site, drops[site.path])
        return gradient, slopes

    def back_through(self, block: int, hidden: Tensor, gradient: Tensor, window: int) -> None:
        """Run a block, whose matrices are in place, over one window and go back through it.

        Args:
            block: of the range.
            hidden: ``n x t x h`` that it received.
            gradient: ``n x t x h`` with respect to its output; the window's becomes that with
                respect to what it received.
            window: which.
        """
        place = slice(window, window + 1)
        with torch.enable_grad():
            start = hidden[place].detach().requires_grad_(True)
            self.skeleton.run_block(block, start).backward(gradient[place])
        assert start.grad is not None, "every block's output depends on what it receives"
        gradient[place] = start.grad

    def _slope(self, site: Site, num_dropped: int) -> float:
        assert self._weights is not None, "slopes are of strategies"
        return self._weights.slope(site, self._live(site).grad, num_dropped)

    @contextmanager
    def loaded(self, block: int, drops: Drops | None) -> Iterator[None]:
        """Put a block's matrices in place while the block inside runs.

        Args:
            block: of the range.
            drops: what its sites lose; none: the dense matrices themselves.
        """
        sites = [site for site in self.sites if site.block == block]
        metas = [self._live(site) for site in sites]
        for number, site in enumerate(sites):
            target = self._buffer(number, self.dense[site.path].shape)
            if drops is None:
                target.copy_(self.dense[site.path])
            else:
                assert self._weights is not None, "strategies are cut from ranks"
                self._weights.cut(site, drops[site.path], target)
            self.skeleton.place(f"{site.path}.weight", target)
        try:
            yield
        finally:
            for site, meta in zip(sites, metas, strict=True):
                self.skeleton.place(f"{site.path}.weight", meta)

    def _live(self, site: Site) -> nn.Parameter:
        weight = site_module(self.skeleton.model, site).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _buffer(self, number: int, shape: torch.Size) -> Tensor:
        """Return the memory that the ``number``-th matrix of any block is cut into."""
        if (number, shape) not in self._buffers:
            skeleton = self.skeleton
            self._buffers[number, shape] = torch.empty(
                shape, device=skeleton.device, dtype=skeleton.dtype
            )
        return self._buffers[number, shape]

    def _read(self, profile: ModelProfile, reader: TensorReader) -> dict[str, Tensor]:
        """Read all that is the stage's; return the sites' matrices, put the rest in place."""
        skeleton = self.skeleton
        sites = {f"{site.path}.weight": site.path for site in self.sites}
        dense: dict[str, Tensor] = {}
        for name in self._own_parameters(profile):
            shape = skeleton.model.get_parameter(name).shape
            tensor = reader.read(skeleton.aliases[name], shape).to(skeleton.device)
            if name in sites:
                dense[sites[name]] = tensor
            else:
                self._replaced[name] = skeleton.model.get_parameter(name).detach()
                skeleton.place(name, tensor.to(skeleton.dtype))
        for name, buffer in skeleton.model.named_buffers():
            if self._is_own_block(name, profile) and reader.holds(name):
                own = reader.read([name], buffer.shape).to(buffer.device, buffer.dtype)
                skeleton.place_buffer(name, own)
        return dense

    def _own_parameters(self, profile: ModelProfile) -> list[str]:
        skeleton = self.skeleton
        own = [name for name in skeleton.aliases if self._is_own_block(name, profile)]
        shared = next((name for name in own if len(skeleton.aliases[name]) > 1), None)
        if shared is not None:
            raise ModelError(
                f"{profile.architecture} shares {shared} between modules, which stages can't; "
                "use one shard"
            )
        outer = [*(skeleton.before if self._ends and self.is_first else ())]
        outer += skeleton.after if self._ends and self.is_last else ()
        # Tied ones are placed under all their names at once.
        return [*own, *{skeleton.aliases[name]: name for name in outer}.values()]

    def _is_own_block(self, name: str, profile: ModelProfile) -> bool:
        return any(name.startswith(f"{profile.block_paths[block]}.") for block in self.blocks)


def _has_memory(parameter: Tensor) -> bool:
    """Say whether a parameter is neither a ghost nor without memory at all."""
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= parameter.nbytes
