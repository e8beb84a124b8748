"""The deployment that speaks HTTP. It only puts the parts together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.handles import Handle

if TYPE_CHECKING:
    from serve.gate import Gate


class Ingress:
    """One replica of the ingress.

    Args:
        config: of the service.
        handles: deployment name -> handle: ``strategies``, ``pruning`` and, if there, ``models``.
    """

    def __init__(self, config: ServeConfig, handles: dict[str, Handle]) -> None:
        from serve.metrics import Metrics
        from serve.packing import Packing
        from serve.planning import Arrivals, Planning
        from serve.service import Service
        from unicuco.store import JobStore

        arrivals = Arrivals()
        catalogue = Catalogue(config)
        catalogue.make_folders()
        self._service = Service(
            config=config,
            catalogue=catalogue,
            jobs=JobStore.open(config.jobs_location),
            metrics=Metrics(),
            arrivals=arrivals,
            planning=Planning(
                handles["strategies"],
                max_waiting=config.bounds.max_in_flight,
                # Of several ingresses none knows which the proxy will send the others to.
                arrivals=arrivals if config.ingress_replicas == 1 else None,
            ),
            packing=Packing(handles["pruning"], catalogue, max_waiting=config.bounds.max_packings),
            strategies=handles["strategies"],
            pruning=handles["pruning"],
            models=handles.get("models"),
        )
        self._gate: Gate | None = None

    # Any: an ASGI application, as Ray Serve asks for it after construction.
    def __serve_build_asgi_app__(self) -> Any:
        """Return the application."""
        from serve.api import build_api

        self._gate = build_api(self._service)
        return self._gate

    async def drain(self) -> None:
        """Refuse whoever comes from now on; return when all the others are answered."""
        self._service.is_draining = True
        if self._gate is not None:
            await self._gate.drain()
