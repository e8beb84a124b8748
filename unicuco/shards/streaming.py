"""`StreamedModel`: passes over a whole model of which one block at a time is in memory.

What learning needs of the dense model before and after its strategies are judged - drop order,
Fisher sums, dense predictions, the validation of its answers - runs block by block: a block is read
from the files, all of the text goes through it, and it is forgotten. What the blocks received is
kept in files where a backward pass needs it again, and so is the drop order while it grows. So a
process needs room for one block, the embeddings or the head, and the hidden states of a text.

Every number is the unsharded one: the same kernels on the same shapes in the same order.

What it does not know: strategies other than by what sites lose; processes.

Notation: n windows of t tokens, h hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unicuco.calibration import TokenSet, check_vocabulary, measure_input_norms
from unicuco.evaluate.sites import SiteWeights
from unicuco.importance import ImportanceMetric
from unicuco.importance.fisher import measure_rank_sums, own_label_loss
from unicuco.models.reading import TensorReader
from unicuco.models.structure import check_causal, probe_tokens
from unicuco.models.weights import folder_source
from unicuco.objectives import DenseReference
from unicuco.ranks import RankStore, build_ranks
from unicuco.shards.skeleton import Skeleton
from unicuco.shards.stage import Drops, Stage
from unicuco.tensors import map_tensors
from unicuco.types import ModelProfile


class StreamedModel:
    """One model folder.

    Args:
        folder: the model's.
        model_config: its configuration as JSON.
        profile: the model's.

    Raises:
        ModelError: the model can't be taken apart.
    """

    def __init__(self, folder: Path, model_config: str, profile: ModelProfile) -> None:
        self.profile = profile
        self._skeleton = Skeleton(model_config, profile)
        self._reader = TensorReader(folder_source(folder), self._skeleton.model)

    def check_causal(self) -> None:
        """Refuse a model whose predictions depend on later tokens; one pass over two short windows.

        Raises:
            ModelError: it is no causal model, or predicts NaN.
        """
        probes = probe_tokens(self.profile.vocabulary_size, self.profile.max_context)
        first, second = self.logits(list(probes))
        check_causal(self._skeleton.model, first, second)

    @torch.no_grad()
    def build_ranks(self, metric: ImportanceMetric, tokens: TokenSet, scratch: Path) -> RankStore:
        """Return the drop order under a metric; one pass over ``tokens``.

        Its tensors lie in the folder ``scratch``, and are read where they are looked at.

        Raises:
            ModelError: a token lies outside the vocabulary, or inputs or scores are not finite.
        """
        check_vocabulary(self.profile, tokens)
        ranks: dict[str, Tensor] = {}
        hidden: list[Tensor] = []
        for stage in self._stages():
            if stage.is_first:
                hidden = [self._skeleton.embed(batch) for batch in tokens.batches()]
            block, own = stage.blocks.start, replace(self.profile, sites=stage.sites)

            def run(block: int = block, batches: list[Tensor] = hidden) -> None:
                batches[:] = [self._skeleton.run_block(block, batch) for batch in batches]

            with stage.loaded(block, None):
                norms = measure_input_norms(self._skeleton.model, own, run)
                found = build_ranks(self._skeleton.model, own, metric, norms).ranks
                ranks |= _spill(found, scratch / f"ranks-{block}")
        return RankStore(metric=metric.name, ranks=ranks)

    def fisher_rank_sums(
        self, ranks: Mapping[str, Tensor], tokens: TokenSet, scratch: Path, *, seed: int
    ) -> dict[str, Tensor]:
        """Do what `unicuco.importance.fisher.fisher_rank_sums` does, with room in ``scratch``."""
        windows = list(tokens.ids.split(1))
        received: list[Tensor] = []
        gradient = torch.empty(0)
        for stage, hidden in self._forward(windows, received, scratch):
            if stage.is_last:
                gradient = self._label_gradients(hidden, torch.Generator().manual_seed(seed))
        sums: dict[str, Tensor] = {}
        for stage in self._stages(backwards=True, ends=False):
            block, own = stage.blocks.start, replace(self.profile, sites=stage.sites)

            def run(stage: Stage = stage, block: int = block) -> None:
                for window in range(len(windows)):
                    stage.back_through(block, received[block], gradient, window)

            with stage.loaded(block, None):
                sums |= measure_rank_sums(self._skeleton.model, own, ranks, tokens.num_tokens, run)
        return {site.path: sums[site.path] for site in self.profile.sites}

    def dense_reference(self, ids: Tensor) -> DenseReference:
        """Return the dense predictions on ``n x t`` tokens; one pass over them."""
        logits = self.logits(list(ids.split(1)))
        return DenseReference.concatenate([DenseReference.from_logits(own) for own in logits])

    def count_zeros(self) -> int:
        """Return how many of the sites' weights are zero."""
        return sum(
            int((weight == 0).sum())
            for stage in self._stages(ends=False)
            for weight in stage.dense.values()
        )

    @torch.no_grad()
    def window_kl(
        self,
        strategies: Sequence[Drops],
        ids: Tensor,
        reference: DenseReference,
        ranks: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Judge several strategies in one pass over the files.

        Args:
            strategies: what every site of the model loses, for each of them.
            ids: ``n x t`` tokens.
            reference: dense predictions on them.
            ranks: the drop order.

        Returns:
            Per strategy, the mean KL per token of every window, ``n`` float64.
        """
        width = ids.shape[1]
        hidden: list[Tensor] = []
        found: list[Tensor] = []
        for stage in self._stages():
            stage.use(SiteWeights(stage.dense, ranks, {}, stage.sites))
            if stage.is_first:
                hidden = [stage.embed(ids)] * len(strategies)
            for k, drops in enumerate(strategies):
                hidden[k] = stage.forward(drops, hidden[k])
            if stage.is_last:
                for states in hidden:
                    means = [
                        reference.slice(w * width, (w + 1) * width)
                        .kl(self._skeleton.logits(states[w : w + 1]))
                        .double()
                        .mean()
                        for w in range(len(ids))
                    ]
                    found.append(torch.stack(means))
        return found

    def logits(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield ``t x v`` dense logits of each of some windows, ``1 x t``; one pass over them."""
        for stage, hidden in self._forward(windows):
            if stage.is_last:
                for states in hidden.split(1):
                    with torch.no_grad():
                        logits = self._skeleton.logits(states).float()
                    yield logits

    def _forward(
        self,
        windows: Sequence[Tensor],
        received: list[Tensor] | None = None,
        scratch: Path = Path(),
    ) -> Iterator[tuple[Stage, Tensor]]:
        """Run windows through the dense blocks; yield each as a stage, with its output.

        ``received`` gets what each block received, in files in ``scratch``; none: kept nowhere.
        """
        hidden = torch.empty(0)
        for stage in self._stages():
            if stage.is_first:
                hidden = torch.cat([self._skeleton.embed(window) for window in windows])
            if received is not None:
                path = scratch / f"hidden-{stage.blocks.start}"
                received.append(_spill({"hidden": hidden}, path)["hidden"])
            hidden = stage.forward(None, hidden)
            yield stage, hidden

    def _label_gradients(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of the loss of own labels to the last block's output."""
        gradient = torch.empty_like(hidden)
        for window in range(len(hidden)):
            place = slice(window, window + 1)
            with torch.enable_grad():
                end = hidden[place].detach().requires_grad_(True)
                own_label_loss(self._skeleton.logits(end), generator).backward()
            assert end.grad is not None, "logits depend on the last block"
            gradient[place] = end.grad
        return gradient

    def _stages(self, *, backwards: bool = False, ends: bool = True) -> Iterator[Stage]:
        """Yield one block after the other, each gone when the next one comes; `ends` as `Stage`."""
        order = range(self.profile.num_blocks)
        for block in reversed(order) if backwards else order:
            stage = Stage(self._skeleton, range(block, block + 1), self._reader, ends=ends)
            try:
                yield stage
            finally:
                stage.close()


def _spill(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Move tensors into a file, from which they are read where they are looked at."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return map_tensors(path)[1]
