"""A small text model with a shared backbone and two heads: the next token, and the kind of text.

The text is synthetic: a few kinds, each a Markov chain of its own over the same letters. What the
model is for: AdapMTL, whose thresholds per component need components that differ. The head of the
easy task is far larger than it needs to be and its weights are large; the backbone's are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

NUM_LETTERS: Final = 24
NUM_KINDS: Final = 4
_WINDOW: Final = 24
_REACH: Final = 6  # letters that the backbone sees at a position
_EMBEDDING: Final = 16
_HIDDEN: Final = 32
_LARGE_HEAD: Final = 384
_LARGE_WEIGHTS: Final = 3.0
_SUCCESSORS: Final = 2
_OWN: Final = 0.25  # of a letter's odds that depends on the kind


class TwoTaskModel(nn.Module):
    """Predicts every next letter and the kind of the whole window.

    Args:
        seed: of the weights.
    """

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(NUM_LETTERS, _EMBEDDING)
            self.backbone = nn.Sequential(
                nn.Linear(_REACH * _EMBEDDING, 2 * _HIDDEN), nn.SiLU(),
                nn.Linear(2 * _HIDDEN, _HIDDEN), nn.SiLU(),
            )  # fmt: skip
            self.next_head = nn.Linear(_HIDDEN, NUM_LETTERS)
            self.kind_head = nn.Sequential(
                nn.Linear(_HIDDEN, _LARGE_HEAD), nn.SiLU(), nn.Linear(_LARGE_HEAD, NUM_KINDS)
            )
            with torch.no_grad():
                for name, weight in self.kind_head.named_parameters():
                    if name.endswith("weight"):
                        weight.mul_(_LARGE_WEIGHTS)

    def components(self) -> dict[str, list[str]]:
        """Return the weight matrices of the backbone and of either head."""
        return {
            "backbone": ["backbone.0.weight", "backbone.2.weight"],
            "next": ["next_head.weight"],
            "kind": ["kind_head.0.weight", "kind_head.2.weight"],
        }

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Return both losses on ``n x (1 + window)`` rows: the kind, then the letters."""
        kinds, letters = batch[:, 0], batch[:, 1:]
        seen = self.embedding(letters[:, :-1]).unfold(1, _REACH, 1)  # (n, t, e, reach)
        hidden = self.backbone(seen.flatten(2))  # (n, t, h)
        following = letters[:, _REACH:]
        next_loss = nn.functional.cross_entropy(
            self.next_head(hidden).flatten(0, 1), following.flatten()
        )
        kind_loss = nn.functional.cross_entropy(self.kind_head(hidden.mean(1)), kinds)
        return {"next": next_loss, "kind": kind_loss}


def two_task_batches(*, seed: int, size: int = 32) -> Iterator[Tensor]:
    """Yield ``size x (1 + window)`` rows for ever: a kind of text, then letters of that kind."""
    chains = _chains()
    generator = torch.Generator().manual_seed(seed)
    while True:
        kinds = torch.randint(NUM_KINDS, (size,), generator=generator)
        letters = torch.randint(NUM_LETTERS, (size, _WINDOW), generator=generator)
        for k in range(1, _WINDOW):
            odds = chains[kinds, letters[:, k - 1]]  # (size, letters)
            letters[:, k] = torch.multinomial(odds, 1, generator=generator)[:, 0]
        yield torch.cat([kinds[:, None], letters], dim=1)


def _chains() -> Tensor:
    """Return ``kinds x letters x letters`` transition odds: mostly common to all kinds."""
    generator = torch.Generator().manual_seed(11)
    common = _odds(1, generator).expand(NUM_KINDS, -1, -1)
    return (1 - _OWN) * common + _OWN * _odds(NUM_KINDS, generator)


def _odds(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count x letters x letters`` odds, each row with few likely successors."""
    order = torch.rand(count, NUM_LETTERS, NUM_LETTERS, generator=generator).argsort(-1)
    return 0.1 / NUM_LETTERS + 0.9 / _SUCCESSORS * (order < _SUCCESSORS)
