"""The deployment that takes jobs and cuts variants."""

from __future__ import annotations

from serve.config import ServeConfig


class Pruning:
    """One replica.

    Args:
        config: of the service.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
