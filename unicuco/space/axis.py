"""What a space is made of: axes, and the cost model that the dimensions give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from unicuco.types import ModelProfile, Part, ServedAs


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One coordinate of a strategy.

    ``name`` is ``dimension/site``; settings lie in [low, high] on the grid k / num_steps, and more
    is always smaller. ``num_steps`` of a sparsity axis is its number of weights; a yes-or-no axis
    has one step. A step of an axis with ``is_shape`` takes many weights away at once. What an axis
    costs alone is taken to grow with its setting to the ``power``, where nothing else is known.
    """

    name: str
    low: float
    high: float
    num_steps: int
    is_shape: bool = False
    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or self.num_steps < 1:
            raise ValueError(f"axis {self.name} needs 0 <= low < high <= 1 and a step, got {self}")

    @property
    def max_step(self) -> int:
        """The last grid step inside the range."""
        return int(self.high * self.num_steps + 1e-9)

    @property
    def is_choice(self) -> bool:
        """True for a yes-or-no axis."""
        return self.num_steps == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowing:
    """What a part loses of its width.

    ``units`` are whole ones; of every head that stays, ``pairs`` are rotary pairs of coordinates of
    its queries and keys, ``ranks`` coordinates of its values.
    """

    units: int = 0
    pairs: int = 0
    ranks: int = 0

    def __add__(self, other: Narrowing) -> Narrowing:
        return Narrowing(
            units=self.units + other.units,
            pairs=self.pairs + other.pairs,
            ranks=self.ranks + other.ranks,
        )

    def __bool__(self) -> bool:
        return bool(self.units or self.pairs or self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is left of a model: parts that are gone, what others lost, weights that are zero.

    ``parts`` are positions among the cost model's; ``narrowed`` are (part, what it lost) of others;
    ``sizes`` the weights of every site that are still stored, ``zeroed`` those of them set to zero.
    """

    parts: frozenset[int]
    narrowed: tuple[tuple[int, Narrowing], ...]
    sizes: tuple[int, ...]
    zeroed: tuple[int, ...]


class CostModel(Protocol):
    """Parameters and bytes of strategies, made by the dimensions; rising along no axis.

    Budgets count a strategy's size: its kept parameters, or its bytes where dimensions change bits.
    ``total_size`` is the dense model's, ``site_size`` what of it the axes work on,
    ``counts_bytes`` which of the two it is; ``profile`` is the dense model's, ``parts`` what can be
    removed by itself.
    """

    profile: ModelProfile
    total_params: int
    num_site_weights: int
    total_size: int
    site_size: int
    counts_bytes: bool
    parts: tuple[Part, ...]

    @property
    def served_as(self) -> ServedAs:
        """How a variant is stored."""

    @property
    def slack(self) -> float:
        """By how much the relaxed size of settings on the grid may be less than the exact one."""

    def size(self, settings: Tensor) -> Tensor:
        """Return the relaxed size, ``b`` float64, of ``b x d`` settings; differentiable.

        Of settings on the grid it is exact, but for ``slack`` where several dimensions meet.
        """

    def size_of(self, values: Sequence[float]) -> int:
        """Return the exact size of a strategy."""

    def kept(self, settings: Tensor) -> Tensor:
        """Return the relaxed kept parameters, ``b``, of ``b x d`` settings; differentiable."""

    def shape(self, values: Sequence[float]) -> Shape:
        """Return exactly what is left of the model."""

    def site_drops(self, values: Sequence[float]) -> dict[str, int]:
        """Return the exact number of weights each site loses: all of them where it is removed."""

    def site_losses(self, values: Sequence[float]) -> list[float]:
        """Return the share of its size that every site loses."""

    def kept_params(self, values: Sequence[float]) -> int:
        """Return how many parameters of the whole model are neither zeroed nor removed."""

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the tensor bytes of the variant as it is stored."""
