"""The deployment that answers requests with strategies; it holds every run, and no weights."""

from __future__ import annotations

from serve.config import ServeConfig


class Strategies:
    """One replica.

    Args:
        config: of the service.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config

    async def ping(self) -> bool:
        """Say that the runs are open."""
        return True
