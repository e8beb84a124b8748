"""A model with planted unequal sensitivity: the first block carries it, the others hardly matter.

A real Llama that the real evaluator judges, made so that every kind of evidence can see the plant.
First block: weights of nearly equal size, so that any that is dropped is missed, a few outliers
among them, spectra with a tail. Others: random rotations (bell-shaped weights, flat spectra) whose
contribution to the residual stream is damped, the more the later.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions import Granularity
from unicuco.evaluate import LocalEvaluator
from unicuco.models import load_model, load_tokenizer, quiet_transformers, site_module
from unicuco.space import StrategySpace
from unicuco.testing.cases import EvaluationCase, make_evaluation_case, random_tokens
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Strategy

NUM_BLOCKS: Final = 6
SENSITIVE_BLOCKS: Final = (0,)
_HIDDEN: Final = 48
_SPREAD: Final = 0.3  # of the sizes of a sensitive block's weights around their mean
_FLOOR: Final = 0.3  # of their deviation: how small weights of the other blocks get
_OUTLIERS: Final = 0.03
_OUTLIER_SIZE: Final = 8.0
_DAMPING: Final = (1.0, 0.15, 0.12, 0.1, 0.08, 0.06)  # of what a block adds to the residual stream


def planted_model_folder(folder: Path, *, seed: int = 0) -> Path:
    """Write the planted model with its tokenizer; the parent of ``folder`` holds a raw one too."""
    raw = folder.with_name(f"{folder.name}-raw")
    tiny_model_folder(raw, hidden_size=_HIDDEN, num_blocks=NUM_BLOCKS, seed=seed)
    loaded = load_model(raw)
    generator = torch.Generator().manual_seed(seed)
    for site in loaded.profile.sites:
        make = _equal_weights if site.block in SENSITIVE_BLOCKS else _rotation
        weight = make(site.num_rows, site.num_columns, generator)
        if site.block not in SENSITIVE_BLOCKS:
            weight *= _scale(site.path.rpartition(".")[2], _DAMPING[site.block])
        with torch.no_grad():
            site_module(loaded.model, site).weight.copy_(weight)  # type: ignore[operator]
    with quiet_transformers():
        loaded.model.save_pretrained(folder)
    load_tokenizer(raw).save_pretrained(folder)
    return folder


@cache
def planted_case(granularity: Granularity = Granularity.LAYER, seed: int = 0) -> EvaluationCase:
    """Return the planted model ready to be judged, on random tokens."""
    with TemporaryDirectory() as folder:
        path = planted_model_folder(Path(folder) / "planted", seed=seed)
        return make_evaluation_case(
            path,
            tokens=random_tokens(seed=1, num_windows=8, context=48),
            calibration=random_tokens(seed=2, num_windows=8, context=48),
            granularity=granularity,
        )


@cache
def planted_judge() -> LocalEvaluator:
    """Return one evaluator of the default planted model for all who judge on it in turn."""
    return planted_case().evaluator()


def reversed_strategy(space: StrategySpace, strategy: Strategy) -> Strategy:
    """Give the most pruned axis the least pruned one's setting and so on, at the same budget."""
    unit = space.encode([strategy])[0]
    order = unit.argsort(stable=True)
    swapped = torch.empty_like(unit)
    swapped[order] = unit[order.flip(0)]
    return _at_budget(space, strategy, swapped)


def shuffled_strategy(space: StrategySpace, strategy: Strategy, *, seed: int) -> Strategy:
    """Deal a strategy's settings out to the axes at random, at the same budget."""
    unit = space.encode([strategy])[0]
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))
    return _at_budget(space, strategy, unit[order])


def _at_budget(space: StrategySpace, strategy: Strategy, unit: Tensor) -> Strategy:
    return space.decode_exact(unit[None], [space.cost.kept_params(strategy.values)])[0]


def _scale(name: str, damping: float) -> float:
    # Of every site so that weight times input is about the damping everywhere: scores of a block
    # then differ by its weights, not from site to site.
    return {"o_proj": 1.0, "down_proj": 1 / damping}.get(name, damping)


def _equal_weights(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    sign: Tensor = torch.randint(0, 2, (rows, columns), generator=generator) * 2.0 - 1
    size = 1 + _SPREAD * (2 * torch.rand(rows, columns, generator=generator) - 1)
    outlier = torch.rand(rows, columns, generator=generator) < _OUTLIERS
    weight: Tensor = sign * torch.where(outlier, _OUTLIER_SIZE, size)
    return weight / math.sqrt(columns)


def _rotation(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    wide = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis: Tensor = torch.linalg.qr(wide).Q
    basis = basis if rows >= columns else basis.T
    floor = _FLOOR * basis.std()
    return torch.where(basis.abs() < floor, floor * basis.sign(), basis)
