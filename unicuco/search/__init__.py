"""Searches: ask/tell loops that decide which strategies are worth an evaluation.

Add a preset: write ``search/x.py`` with a class that implements `Search` and a function that learns
a network from evaluations, and add one line to each of `SEARCHES` and `LEARNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from unicuco.errors import RequestError
from unicuco.search.base import Search, SearchConfig
from unicuco.search.front import FrontSearch, learn_front
from unicuco.search.paper import PaperSearch, learn_preferences
from unicuco.stratnet import StratNet
from unicuco.surrogate import GaussianProcess
from unicuco.types import Evaluation, Strategy

Learner = Callable[..., tuple[GaussianProcess, StratNet]]

SEARCHES: Final[dict[str, Callable[[SearchConfig], Search]]] = {
    "default": FrontSearch,
    "paper": PaperSearch,
}
LEARNERS: Final[dict[str, Learner]] = {"default": learn_front, "paper": learn_preferences}


def build_search(config: SearchConfig) -> Search:
    """Make the search that a configuration names.

    Raises:
        RequestError: an unknown preset.
    """
    if config.preset not in SEARCHES:
        raise RequestError(f"preset must be one of {', '.join(SEARCHES)}, got {config.preset!r}")
    return SEARCHES[config.preset](config)


def learn_network(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[GaussianProcess, StratNet]:
    """Learn surrogate and StratNet from evaluations, as the preset does it.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    return LEARNERS[config.preset](config, evaluations, seed=seed)


__all__ = ["LEARNERS", "SEARCHES", "Search", "SearchConfig", "build_search", "learn_network"]
