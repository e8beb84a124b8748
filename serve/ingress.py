"""The deployment that speaks HTTP. It only puts the parts together."""

from __future__ import annotations

from typing import Any

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.service import Handle, Service


class Ingress:
    """One replica of the ingress.

    Args:
        config: of the service.
        handles: deployment name -> handle: ``strategies``, ``pruning`` and, if there, ``models``.
    """

    def __init__(self, config: ServeConfig, handles: dict[str, Handle]) -> None:
        self._service = Service(
            config=config,
            catalogue=Catalogue(config),
            strategies=handles["strategies"],
            pruning=handles["pruning"],
            models=handles.get("models"),
        )

    # Any: an ASGI application, as Ray Serve asks for it after construction.
    def __serve_build_asgi_app__(self) -> Any:
        """Return the application."""
        from serve.api import build_api

        return build_api(self._service)
