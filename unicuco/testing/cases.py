"""Small models made ready to be judged and learned: ranks, Fisher sums, text, arrays, space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate import AllocationContext, AxisCurves, Evidence, TextPart
from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.dimensions import Granularity, any_narrows, build_space
from unicuco.evaluate import EvaluatorConfig, LocalEvaluator, dense_reference
from unicuco.evaluate.arrays import Arrays, pack_model, pack_text
from unicuco.importance import METRICS
from unicuco.importance.fisher import fisher_rank_sums
from unicuco.importance.units import UnitStore, build_units
from unicuco.models import LoadedModel, load_model, load_tokenizer, quiet_transformers
from unicuco.models.weights import weight_source
from unicuco.ranks import RankStore, build_ranks
from unicuco.space import StrategySpace
from unicuco.testing.tiny import tiny_model_folder

_LEARNING_RATE: Final = 3e-3
_BATCH: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationCase:
    """A model, its drop order and a text: what an evaluator and a search are built from."""

    loaded: LoadedModel
    tokens: TokenSet
    calibration: TokenSet
    ranks: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    config: EvaluatorConfig
    arrays: Arrays
    space: StrategySpace
    curves: AxisCurves
    units: UnitStore | None = None

    @property
    def context(self) -> AllocationContext:
        """What one-shot allocators look at, the model itself included; the same at every call."""
        return _context(self)

    def evaluator(self) -> LocalEvaluator:
        """Build an evaluator of its own."""
        return LocalEvaluator.from_arrays(self.config, self.arrays)

    def evaluator_on(self, tokens: TokenSet) -> LocalEvaluator:
        """Build an evaluator on another text."""
        text = pack_text(tokens.ids, dense_reference(self.loaded.model, tokens.ids))
        config = replace(self.config, text_digest=tokens.digest)
        return LocalEvaluator.from_arrays(config, {**self.arrays, **text})


@cache
def _context(case: EvaluationCase) -> AllocationContext:
    return AllocationContext(
        space=case.space,
        curves=case.curves,
        evidence=Evidence(
            loaded=case.loaded,
            ranks=RankStore(metric="wanda", ranks=case.ranks),
            granularity=case.config.granularity,
            calibration=case.calibration,
            texts=RandomTexts(),
            seed=0,
        ),
    )


class RandomTexts:
    """A `TextSource` of random tokens that every tiny model knows."""

    def windows(self, part: TextPart, *, tokens: int, context: int) -> TokenSet:
        """Return seeded windows, the same for equal arguments."""
        seed = 100 + list(TextPart).index(part)
        return random_tokens(seed=seed, num_windows=tokens // context, context=context)


def make_evaluation_case(
    folder: Path,
    *,
    tokens: TokenSet | None = None,
    calibration: TokenSet | None = None,
    dimensions: tuple[str, ...] = ("sparsity",),
    granularity: Granularity = Granularity.LAYER,
) -> EvaluationCase:
    """Prepare a model as `learn` does, Wanda's drop order included.

    Args:
        folder: of the model.
        tokens: the text that strategies are judged on; none: four windows of 24 random tokens.
        calibration: the text of norms and Fisher sums; none: four other such windows.
        dimensions: of the space.
        granularity: of the space.
    """
    loaded = load_model(folder)
    tokens = tokens or random_tokens(seed=1)
    calibration = calibration or random_tokens(seed=2)
    norms = collect_input_norms(loaded.model, loaded.profile, calibration)
    ranks = build_ranks(loaded.model, loaded.profile, METRICS["wanda"], norms).ranks
    fisher = fisher_rank_sums(loaded.model, loaded.profile, ranks, calibration, seed=0)
    space = build_space(loaded.profile, dimensions, granularity)
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    persistent = loaded.model.state_dict().keys()
    state |= {name: b for name, b in loaded.model.named_buffers() if name in persistent}
    config = EvaluatorConfig(
        model_config=loaded.model.config.to_json_string(),
        profile=loaded.profile,
        dimensions=dimensions,
        granularity=granularity,
        text_digest=tokens.digest,
        weights=weight_source(loaded.folder),
    )
    text = pack_text(tokens.ids, dense_reference(loaded.model, tokens.ids))
    units = None
    if any_narrows(dimensions):
        units = build_units(loaded, calibration, inside_heads="low_rank" in dimensions)
    return EvaluationCase(
        loaded=loaded,
        tokens=tokens,
        calibration=calibration,
        ranks=ranks,
        fisher=fisher,
        config=config,
        arrays={**pack_model(state, ranks, fisher, units), **text},
        space=space,
        curves=AxisCurves.from_fisher(space, loaded.profile, granularity, fisher),
        units=units,
    )


def random_tokens(*, seed: int, num_windows: int = 4, context: int = 24) -> TokenSet:
    """Return windows of tokens that every tiny model knows."""
    generator = torch.Generator().manual_seed(seed)
    return TokenSet.from_ids(torch.randint(1, 257, (num_windows, context), generator=generator))


def trained_model_folder(folder: Path, text: str, *, steps: int = 150, seed: int = 0) -> Path:
    """Write a tiny Llama trained on ``text`` for seconds, so that its weights have reasons.

    Args:
        folder: made if missing; its parent also holds the untrained model.
        text: what it learns, by bytes.
        steps: of Adam, eight windows of 64 bytes each.
        seed: decides weights and windows.
    """
    raw = folder.with_name(f"{folder.name}-raw")
    tiny_model_folder(raw, hidden_size=32, num_blocks=3, context=64, tied=True, seed=seed)
    model, tokenizer = load_model(raw).model, load_tokenizer(raw)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / steps)
        starts = torch.randint(len(ids) - 64, (_BATCH,), generator=generator)
        windows = torch.stack([ids[start : start + 64] for start in starts.tolist()])
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
