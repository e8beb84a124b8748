"""The error tree, by cause. Every error a user can meet is a `UnicucoError` with one clear line.

The line says what is wrong and what to do. ``exit_code`` is what the command line ends with: 2
wrong use, 3 a request that can't be met, 1 anything else.
"""

from __future__ import annotations

from typing import ClassVar


class UnicucoError(Exception):
    """Base of all errors that are not bugs."""

    exit_code: ClassVar[int] = 1


class RequestError(UnicucoError, ValueError):
    """A request or option that means nothing: out of range, unknown, no or two targets."""

    exit_code: ClassVar[int] = 2


class InfeasibleRequestError(UnicucoError):
    """A well-formed request that this run can't meet, or that lies outside what was learned.

    ``nearest`` is the nearest value of the same target that can be met, or none if there is none.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, nearest: float | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class ModelError(UnicucoError):
    """A path without a usable model: nothing there, pickles only, NaN weights, an unknown shape."""


class TextError(UnicucoError):
    """A text that can't be read, or is too short for what is asked of it."""


class RunError(UnicucoError):
    """A run folder that is missing, half written, altered, or belongs to another model."""


class VariantError(UnicucoError):
    """A variant folder that is missing, half written or altered."""


class ContainerError(UnicucoError):
    """A packed model that is cut short, altered, or belongs to another base model."""


class StorageError(UnicucoError):
    """The disk or database refused: full, read-only, locked by another driver."""


class EvaluationError(UnicucoError):
    """A strategy whose evaluation failed; carries its key."""

    def __init__(self, message: str, *, strategy_key: str) -> None:
        super().__init__(message)
        self.strategy_key = strategy_key


class AllocationError(UnicucoError):
    """An allocator lacks what it needs, or what it measured is unusable (NaN, too large)."""


class SurrogateError(UnicucoError):
    """The surrogate can't be fitted, e.g. too few successful evaluations."""


class EngineError(UnicucoError):
    """The text engine is not installed or refused a variant."""


class ClusterError(UnicucoError):
    """Ray can't be reached, or can't hold what was asked for."""
