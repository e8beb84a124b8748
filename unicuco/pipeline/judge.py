"""`TestJudge`: what strategies are worth on text that nothing learned from.

One forward pass per strategy gives both numbers: KL to the dense model and perplexity. What it does
not know: where a strategy came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicuco.calibration import TokenSet
from unicuco.errors import TextError
from unicuco.evaluate import LocalEvaluator
from unicuco.pipeline.evaluation import perplexity_of
from unicuco.pipeline.preparation import Prepared
from unicuco.rows import RowRule
from unicuco.types import Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TestQuality:
    """KL(dense‖pruned) in nats per token over all positions, and perplexity of next tokens."""

    __test__ = False  # no test class, whatever pytest makes of its name

    kl: float
    perplexity: float


class TestJudge:
    """Measures strategies of a prepared model on a test text.

    Args:
        prepared: the model.
        text: windows of text that was used for nothing else.

    Raises:
        TextError: no window has a next token to predict.
    """

    __test__ = False

    def __init__(self, prepared: Prepared, text: TokenSet) -> None:
        if text.context < 2:
            raise TextError("the test text is too short: it needs at least 2 tokens")
        self._evaluator = LocalEvaluator(*prepared.judging(text))
        self.num_tokens = text.num_tokens

    def measure(self, strategy: Strategy, rows: RowRule | None = None) -> TestQuality:
        """Return a strategy's quality; infinite where the pruned model overflows."""
        kl, loss = self._evaluator.quality(strategy, rows=rows)
        return TestQuality(
            kl=kl if math.isfinite(kl) else math.inf,
            perplexity=perplexity_of(loss),
        )

    @contextmanager
    def pruned(self, strategy: Strategy, rows: RowRule | None = None) -> Iterator[PreTrainedModel]:
        """Lend the working copy of the model with a strategy in place; leave its weights alone."""
        yield self._evaluator.model_at(strategy, rows=rows)
