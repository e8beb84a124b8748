"""KL(dense‖pruned) per token, against the dense model's cached predictions.

Small vocabularies are kept whole. Of large ones the K >= 512 most probable tokens are kept and all
others are one more outcome, the tail: by the data-processing inequality that KL is never above the
full one, and it is close since the dense tail carries little mass (EvoPress, arXiv 2410.14649,
keeps K >= 512 too).

Notation: t tokens, v vocabulary, k kept entries. p dense, q pruned; entropy is sum p log p over
what is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_FULL_VOCABULARY: Final = 8192
_TOP_K: Final = 1024


def top_k_for(vocabulary_size: int) -> int:
    """Return how many entries of a prediction are kept: a small vocabulary whole, else 1,024."""
    return vocabulary_size if vocabulary_size <= _FULL_VOCABULARY else _TOP_K


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseReference:
    """The dense model's predictions on one text.

    Attributes:
        probabilities: ``t x k`` float32, the kept entries of p.
        indices: ``t x k`` int32, their tokens; or none where the whole vocabulary is kept, in
            order.
        negative_entropy: ``t`` float32, sum of p log p over kept entries and tail.
    """

    probabilities: Tensor
    indices: Tensor | None
    negative_entropy: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> DenseReference:
        """Keep what `kl` needs of ``t x v`` dense logits."""
        log_p = torch.log_softmax(logits.float(), dim=-1)
        k = top_k_for(log_p.shape[-1])
        if k == log_p.shape[-1]:
            p = log_p.exp()
            return cls(probabilities=p, indices=None, negative_entropy=(p * log_p).sum(-1))
        log_top, indices = log_p.topk(k, dim=-1)
        p = log_top.exp()
        tail = _tail(p)
        entropy = (p * log_top).sum(-1) + tail * tail.log()
        return cls(probabilities=p, indices=indices.to(torch.int32), negative_entropy=entropy)

    @classmethod
    def concatenate(cls, parts: list[DenseReference]) -> DenseReference:
        """Join references of consecutive tokens."""
        indices = [part.indices for part in parts if part.indices is not None]
        return cls(
            probabilities=torch.cat([part.probabilities for part in parts]),
            indices=torch.cat(indices) if indices else None,
            negative_entropy=torch.cat([part.negative_entropy for part in parts]),
        )

    def slice(self, start: int, end: int) -> DenseReference:
        """Return the reference of tokens start to end, without copying."""
        return DenseReference(
            probabilities=self.probabilities[start:end],
            indices=None if self.indices is None else self.indices[start:end],
            negative_entropy=self.negative_entropy[start:end],
        )

    def kl(self, logits: Tensor) -> Tensor:
        """Return KL(dense‖pruned) in nats, ``t``, from ``t x v`` pruned logits; differentiable."""
        logits = logits.float()
        if self.indices is None:
            cross = cross_entropy(logits, self.probabilities, reduction="none")
            return self.negative_entropy + cross
        log_q = torch.log_softmax(logits, dim=-1).gather(-1, self.indices.long())
        tail_q = _tail(log_q.exp())
        cross = -(self.probabilities * log_q).sum(-1) - _tail(self.probabilities) * tail_q.log()
        return self.negative_entropy + cross

    def kl_of_uniform(self, vocabulary_size: int) -> Tensor:
        """Return the KL, ``t``, of a model that says ``1 / vocabulary_size`` of every token."""
        cross = torch.full_like(self.negative_entropy, math.log(vocabulary_size))
        if self.indices is not None:  # the tail is one outcome, as likely as all that are in it
            others = vocabulary_size - self.indices.shape[-1]
            cross -= _tail(self.probabilities) * math.log(others)
        return self.negative_entropy + cross


def _tail(probabilities: Tensor) -> Tensor:
    # The rest of the mass; a float32 sum can exceed 1 by rounding.
    return (1.0 - probabilities.sum(-1)).clamp(min=1e-9)
