"""The expressions of DSA: element scores of a block -> pre-operations -> reduction -> post.

An expression is a chain, written ``ABSLOG > [VAR] > ATAN > ASIN``, read back to an equal one, and
applied to a block's scores as one number. Every operation is total: where it is not defined it
gives 0, as the released code counts an importance of NaN, and results are kept finite. So no chain
ever gives NaN. (That matters: ASIN of ATAN of a variance above 1.56 is not defined.)

DSA: Discovering Sparsity Allocation, NeurIPS 2024. GRAM, CORREF, DIAGONAL, DET, SLOGDET and RANK
look at one matrix: the scores of one site; their values are averaged over the block's sites.

Notation: a block's scores are its sites' ``o x i`` matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_TINY: Final = 1e-12
_HUGE: Final = 1e12
_MAX_EXP: Final = 25.0

Elementwise = Callable[[Tensor], Tensor]


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=_HUGE, neginf=-_HUGE).clamp(-_HUGE, _HUGE)


def _log_of_size(x: Tensor) -> Tensor:
    return x.abs().clamp(min=_TINY).log()


def _min_max(x: Tensor) -> Tensor:
    span = x.max() - x.min()
    return (x - x.min()) / span.clamp(min=_TINY)


def _normalised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0).clamp(min=_TINY)


PRE: Final[dict[str, Elementwise]] = {
    "NO_OP": lambda x: x,
    "ABS": torch.abs,
    "LOG": torch.log,
    "ABSLOG": _log_of_size,
    "POW": torch.square,
    "EXP": lambda x: x.clamp(max=_MAX_EXP).exp(),
    "NORMALIZE": _normalised,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "MMS": _min_max,
}


def _gram(x: Tensor) -> Tensor:
    return x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x


def _correlation(x: Tensor) -> Tensor:
    rows = x if x.shape[0] <= x.shape[1] else x.T
    centred = rows - rows.mean(1, keepdim=True)
    unit: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp(min=_TINY)
    return unit @ unit.T


def _log_determinant(x: Tensor) -> Tensor:
    gram = _gram(x)
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=_TINY)
    return values.log().mean()


def _entropy(x: Tensor) -> Tensor:
    p = x.abs() / x.abs().sum().clamp(min=_TINY)
    return -(p * p.clamp(min=_TINY).log()).sum()


# Reductions of a block as a whole: all scores of all sites in one vector.
POOLED: Final[dict[str, Elementwise]] = {
    "NO_OP": torch.mean,
    "FROBENIUS": lambda x: x.square().sum().sqrt(),
    "L1": lambda x: x.abs().sum(),
    "GEOMEAN": lambda x: _log_of_size(x).mean().exp(),
    "MEAN": torch.mean,
    "VAR": lambda x: x.var(correction=0),
    "STD": lambda x: x.std(correction=0),
    "ENTROPY": _entropy,
}
# Reductions of one matrix.
BY_MATRIX: Final[dict[str, Elementwise]] = {
    "GRAM": lambda x: _gram(x).mean(),
    "CORREF": lambda x: _correlation(x).mean(),
    "DIAGONAL": lambda x: x.diagonal().mean(),
    # The determinant per dimension: of the whole nothing but overflow would be left.
    "DET": lambda x: _log_determinant(x).clamp(max=_MAX_EXP).exp(),
    "RANK": lambda x: torch.linalg.matrix_rank(x).to(x.dtype),
    "SLOGDET": _log_determinant,
}
REDUCE: Final[tuple[str, ...]] = (*POOLED, *BY_MATRIX)

POST: Final[dict[str, Elementwise]] = {
    "NO_OP": lambda x: x,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "EXP": lambda x: x.clamp(max=_MAX_EXP).exp(),
    "LOG": torch.log,
    "ABS": torch.abs,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "SOFTPLUS": torch.nn.functional.softplus,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """Up to two pre-operations, one reduction, one or two post-operations, by name."""

    pre: tuple[str, ...]
    reduce: str
    post: tuple[str, ...]

    def __post_init__(self) -> None:
        known = (
            len(self.pre) <= 2
            and 1 <= len(self.post) <= 2
            and self.reduce in REDUCE
            and all(name in PRE for name in self.pre)
            and all(name in POST for name in self.post)
        )
        if not known:
            raise ValueError(f"no such expression: {self}")

    def __str__(self) -> str:
        return " > ".join((*self.pre, f"[{self.reduce}]", *self.post))

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Read what ``str`` wrote.

        Raises:
            ValueError: unknown operations, or a chain of another form.
        """
        names = [name.strip() for name in text.split(">")]
        marked = [k for k, name in enumerate(names) if name.startswith("[") and name.endswith("]")]
        if len(marked) != 1:
            raise ValueError(f"an expression has one [REDUCTION], got {text!r}")
        (at,) = marked
        return cls(pre=tuple(names[:at]), reduce=names[at].strip("[]"), post=tuple(names[at + 1 :]))

    def evaluate(self, scores: Sequence[Tensor]) -> float:
        """Return the importance of a block from its sites' ``o x i`` scores; finite for all."""
        if self.reduce in POOLED:
            pooled = torch.cat([matrix.flatten() for matrix in scores]).double()
            value = _finite(POOLED[self.reduce](self._prepared(pooled)))
        else:
            reduction = BY_MATRIX[self.reduce]
            values = [_finite(reduction(self._prepared(matrix.double()))) for matrix in scores]
            value = torch.stack(values).mean()
        for name in self.post:
            value = _finite(POST[name](value))
        return float(value)

    def _prepared(self, x: Tensor) -> Tensor:
        x = _finite(x)
        for name in self.pre:
            x = _finite(PRE[name](x))
        return x


# Published for 70 % sparsity: W -> ABSLOG -> VAR -> (ATAN, ASIN).
PUBLISHED: Final = Expression(pre=("ABSLOG",), reduce="VAR", post=("ATAN", "ASIN"))
