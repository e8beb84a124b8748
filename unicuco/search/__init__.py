"""Searches: ask/tell loops that decide which strategies are worth an evaluation.

Those of `SEARCHES` learn once for all requests; those of `REQUEST_SEARCHES` search anew for each.

Add a rival: write ``search/x.py`` with a class that implements `RequestSearch`, and add one line to
`REQUEST_SEARCHES`; `RequestSearchContract` (`unicuco/testing/`) tests it. Add a preset: write
``search/x.py`` with a class that implements `Search` and a function that learns a network from
evaluations, and add one line to each of `SEARCHES` and `LEARNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from unicuco.errors import RequestError
from unicuco.search.base import Search, SearchConfig
from unicuco.search.descent import Descent
from unicuco.search.evolution import Evolution
from unicuco.search.evop import Evop
from unicuco.search.front import FrontSearch, learn_front
from unicuco.search.optspa import OptSpa
from unicuco.search.paper import PaperSearch, learn_preferences
from unicuco.search.progression import Progression
from unicuco.search.request import RequestConfig, RequestSearch, SearchAllocator
from unicuco.search.shapes import ShapeSearch, learn_shapes
from unicuco.stratnet import StratNet
from unicuco.surrogate import Surrogate
from unicuco.types import Evaluation, Strategy

Learner = Callable[..., tuple[Surrogate, StratNet]]


def default_search(config: SearchConfig) -> Search:
    """Make the search of preset ``default``: by shapes where there are some, else by weights."""
    return ShapeSearch(config) if config.space().has_shapes else FrontSearch(config)


def learn_default(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[Surrogate, StratNet]:
    """Learn surrogate and StratNet as preset ``default`` does.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    learn = learn_shapes if config.space().has_shapes else learn_front
    return learn(config, evaluations, seed=seed)


SEARCHES: Final[dict[str, Callable[[SearchConfig], Search]]] = {
    "default": default_search,
    "paper": PaperSearch,
}
LEARNERS: Final[dict[str, Learner]] = {"default": learn_default, "paper": learn_preferences}
REQUEST_SEARCHES: Final[dict[str, Callable[[RequestConfig], RequestSearch]]] = {
    "evopress": Evolution,
    "evop": Evop,
    "optspa": OptSpa,
    "atp": Progression,
    "descent": Descent,
}


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
) -> tuple[Surrogate, StratNet]:
    """Learn surrogate and StratNet from evaluations, as the preset does it.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    return LEARNERS[config.preset](config, evaluations, seed=seed)


__all__ = [
    "LEARNERS",
    "REQUEST_SEARCHES",
    "SEARCHES",
    "RequestConfig",
    "RequestSearch",
    "Search",
    "SearchAllocator",
    "SearchConfig",
    "build_search",
    "learn_network",
]
