"""The dense model as preparation and validation need it: in memory as a whole, or block by block.

Both give the same numbers to the bit. Level databases, shapes, bits and clustered samples of text
need the whole model still; learning in shards refuses them. What this module does not know: what
the passes are for.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.dimensions import build_cost
from unicuco.evaluate import EvaluatorConfig, LocalEvaluator, dense_reference
from unicuco.evaluate.arrays import Arrays, narrowest, pack_text, reference_of, unpack
from unicuco.importance import ImportanceMetric
from unicuco.importance.fisher import fisher_rank_sums
from unicuco.models import LoadedModel, load_model, resolve_model
from unicuco.objectives import DenseReference
from unicuco.ranks import RankStore, build_ranks
from unicuco.shards.profile import load_ghost
from unicuco.shards.streaming import StreamedModel
from unicuco.types import Strategy

_SCRATCH: Final = ".scratch-"

# The mean KL per token of every window of a text, ``n`` float64, strategy by strategy.
JudgeWindows = Callable[[Sequence[Strategy]], Iterator[Tensor]]


class DenseModel(Protocol):
    """What can be asked of the dense model.

    ``loaded`` has its profile, configuration and folder; its weights only where it is whole.
    """

    @property
    def loaded(self) -> LoadedModel:
        """The model with what was found in it."""

    def build_ranks(self, metric: ImportanceMetric, tokens: TokenSet) -> RankStore:
        """Return the drop order under a metric; one pass over ``tokens``."""

    def fisher_rank_sums(
        self, ranks: Mapping[str, Tensor], tokens: TokenSet, *, seed: int
    ) -> dict[str, Tensor]:
        """Return every site's Fisher sums by rank; a pass there and back."""

    def dense_reference(self, ids: Tensor) -> DenseReference:
        """Return the dense predictions on ``n x t`` tokens; one pass over them."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that evaluators are to be given; none where they read their own."""

    def judge(self, config: EvaluatorConfig, arrays: Arrays) -> JudgeWindows:
        """Return what judges strategies on the text among ``arrays`` in this process."""


class WholeModel:
    """A model in memory.

    Args:
        loaded: the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def build_ranks(self, metric: ImportanceMetric, tokens: TokenSet) -> RankStore:
        """Return the drop order under a metric."""
        norms = collect_input_norms(self.loaded.model, self.loaded.profile, tokens)
        return build_ranks(self.loaded.model, self.loaded.profile, metric, norms)

    def fisher_rank_sums(
        self, ranks: Mapping[str, Tensor], tokens: TokenSet, *, seed: int
    ) -> dict[str, Tensor]:
        """Return every site's Fisher sums by rank."""
        return fisher_rank_sums(self.loaded.model, self.loaded.profile, ranks, tokens, seed=seed)

    def dense_reference(self, ids: Tensor) -> DenseReference:
        """Return the dense predictions."""
        return dense_reference(self.loaded.model, ids)

    def state(self) -> dict[str, Tensor]:
        """Return the model's tensors by name, the same ones always; see `narrowest`."""
        return self._state

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        # Parameters come without their tied twins; buffers that are saved (some families keep masks
        # there) follow.
        model = self.loaded.model
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        persistent = model.state_dict().keys()
        buffers = {
            n: b
            for n, b in model.named_buffers()
            if n in persistent and isinstance(b, torch.Tensor)
        }
        return {name: narrowest(tensor) for name, tensor in (state | buffers).items()}

    def judge(self, config: EvaluatorConfig, arrays: Arrays) -> JudgeWindows:
        """Return what judges strategies on an evaluator of one's own."""
        evaluator = LocalEvaluator(config, arrays)
        return lambda strategies: (evaluator.window_kl(strategy) for strategy in strategies)


class BlockwiseModel:
    """A model whose blocks are read one after the other, for every pass anew.

    Args:
        loaded: the model, its parameters ghosts.
        scratch: a folder for what passes need room for.
    """

    def __init__(self, loaded: LoadedModel, scratch: Path) -> None:
        self.loaded = loaded
        config = loaded.model.config.to_json_string()
        self._streamed = StreamedModel(loaded.folder, config, loaded.profile)
        self._scratch = scratch
        self._streamed.check_causal()

    def build_ranks(self, metric: ImportanceMetric, tokens: TokenSet) -> RankStore:
        """Return the drop order under a metric; its tensors lie in the scratch folder."""
        return self._streamed.build_ranks(metric, tokens, self._scratch)

    def fisher_rank_sums(
        self, ranks: Mapping[str, Tensor], tokens: TokenSet, *, seed: int
    ) -> dict[str, Tensor]:
        """Return every site's Fisher sums by rank."""
        return self._streamed.fisher_rank_sums(ranks, tokens, self._scratch, seed=seed)

    def dense_reference(self, ids: Tensor) -> DenseReference:
        """Return the dense predictions."""
        return self._streamed.dense_reference(ids)

    def state(self) -> dict[str, Tensor]:
        """Return nothing: stages read their own tensors."""
        return {}

    def judge(self, config: EvaluatorConfig, arrays: Arrays) -> JudgeWindows:
        """Return what judges strategies all together, in one pass over the blocks."""
        tensors = unpack(arrays)
        ranks = {site.path: tensors[f"rank/{site.path}"] for site in config.profile.sites}
        cost = build_cost(config.profile, config.dimensions, config.granularity)

        def judge(strategies: Sequence[Strategy]) -> Iterator[Tensor]:
            drops = [cost.site_drops(strategy.values) for strategy in strategies]
            reference = reference_of(tensors)
            yield from self._streamed.window_kl(drops, tensors["text/ids"], reference, ranks)

        return judge


@contextmanager
def open_dense(name: str, folder: Path, *, whole: bool) -> Iterator[DenseModel]:
    """Open a model; what it keeps on the disk meanwhile is gone afterwards, not the model.

    Args:
        name: as `resolve_model` takes it.
        folder: where there is room, e.g. the run folder; exists.
        whole: whether to load all of it.

    Raises:
        ModelError: no usable model is there.
    """
    if whole:
        yield WholeModel(load_model(name))
        return
    for left in folder.glob(f"{_SCRATCH}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
        yield BlockwiseModel(load_ghost(resolve_model(name)), Path(scratch))


def pack_dense_text(dense: DenseModel, text: TokenSet) -> Arrays:
    """Return a text's arrays for evaluators; runs the dense model once over it."""
    return pack_text(text.ids, dense.dense_reference(text.ids))
