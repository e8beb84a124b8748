"""LayerIF: blocks whose training items harm others more are pruned more (arXiv 2505.23811).

Per block, influence of training items on validation items by DataInf on the model's own next-token
gradients; S is the sum of the positive ones. Low S means well trained, and keeps more. Its authors
published the mapping but not the influence computation; this is written from the paper.

Notation: l blocks, n training items, S per block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.blocks import block_strategies, block_weights, min_max, scaled
from unicuco.allocate.evidence import Evidence, TextPart
from unicuco.allocate.gradients import MEMORY_BYTES, block_products
from unicuco.calibration import TokenSet
from unicuco.errors import AllocationError, RunError
from unicuco.files import replace_bytes
from unicuco.importance.influence import datainf, default_damping, positive_influence
from unicuco.types import Strategy

EPSILON: Final = {"magnitude": 0.3}  # by the metric that prunes; any other: 0.1
_EPSILON: Final = 0.1
_WINDOW, _ORDER = 7, 3  # of the Savitzky-Golay filter
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerIFOptions:
    """How much text: the published 300 and 96 items, at the shortest published length."""

    train_items: int = 300
    validation_items: int = 96
    item_tokens: int = 50
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceScores:
    """S of every block with what it was measured on."""

    scores: tuple[float, ...]
    model_digest: str
    data_digest: str
    seed: int

    def save(self, path: Path) -> None:
        """Write the scores as JSON, whole or not at all.

        Raises:
            StorageError: the disk refused.
        """
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n"
        replace_bytes(path, text.encode())

    @classmethod
    def load(cls, path: Path) -> InfluenceScores:
        """Read what `save` wrote.

        Raises:
            RunError: the file is missing, damaged or of another format.
        """
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(**{**fields, "scores": tuple(map(float, fields["scores"]))})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"the influence scores {path} can't be read: {error!r}") from error


class LayerIF:
    """Sparsity by the influence of training items.

    Args:
        context: with evidence.
        options: how much text is read.
        epsilon: half the width of the factors; none: as published for the metric.
        scores: measured before, of the same model; none: measured now.

    Raises:
        AllocationError: an influence is NaN or infinite, gradients need too much memory, or the
            scores are another model's.
        TextError: the calibration or search text is too short.
    """

    name = "layerif"

    def __init__(
        self,
        context: AllocationContext,
        options: LayerIFOptions | None = None,
        epsilon: float | None = None,
        scores: InfluenceScores | None = None,
    ) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        metric = self._evidence.ranks.metric
        self._epsilon = EPSILON.get(metric, _EPSILON) if epsilon is None else epsilon
        self.scores = scores or measure_influence(self._evidence, options or LayerIFOptions())
        if self.scores.model_digest != self._evidence.profile.digest:
            raise AllocationError("the influence scores were measured on another model")

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity."""
        readiness = smoothed(torch.tensor(self.scores.scores, dtype=torch.float64))
        weights = block_weights(self._evidence.profile)
        blocks = scaled(readiness, weights, sparsities, self._epsilon)
        return block_strategies(self._space, self._evidence, sparsities, blocks)


def measure_influence(evidence: Evidence, options: LayerIFOptions) -> InfluenceScores:
    """Measure S of every block; training items are calibration text, validation items search text.

    Raises:
        AllocationError: an influence is NaN or infinite, or gradients need too much memory.
        TextError: a text is too short.
    """
    train = _items(evidence, TextPart.CALIBRATION, options.train_items, options)
    validation = _items(evidence, TextPart.SEARCH, options.validation_items, options)
    sizes = block_weights(evidence.profile).tolist()
    products = block_products(evidence.loaded, train, validation, memory_bytes=options.memory_bytes)
    scores = []
    for block, ((gram, cross), size) in enumerate(zip(products, sizes, strict=True)):
        damping = default_damping(gram, int(size))
        total = float(positive_influence(datainf(gram, cross, damping)))
        if not (damping > 0 and torch.isfinite(gram).all() and abs(total) < float("inf")):
            raise AllocationError(
                f"the influence of block {block} is NaN or infinite: its gradients vanish or "
                "overflow on this text; give other calibration text"
            )
        scores.append(total)
    return InfluenceScores(
        scores=tuple(scores),
        model_digest=evidence.profile.digest,
        data_digest=f"{train.digest}{validation.digest}",
        seed=evidence.seed,
    )


def smoothed(scores: Tensor) -> Tensor:
    """Return ``l`` readiness in [0, 1]: |S| min-max scaled, Savitzky-Golay filtered, scaled again.

    The filter's window of 7 and order of 3 shrink for models of fewer blocks.
    """
    from scipy.signal import savgol_filter  # half a second that every command would pay

    window = min(_WINDOW, len(scores) - 1 + len(scores) % 2)
    level = min_max(scores.abs())
    filtered = savgol_filter(level.numpy(), window, min(_ORDER, window - 1))
    return min_max(torch.from_numpy(filtered))


def _items(evidence: Evidence, part: TextPart, count: int, options: LayerIFOptions) -> TokenSet:
    length = min(options.item_tokens, evidence.profile.max_context)
    return evidence.texts.windows(part, tokens=count * length, context=length)
