"""What every route may use: one `Service` per ingress replica, reached through `ServiceDependency`.

A router reaches a deployment by its handle: ``await service.strategies.plan.remote(…)``. A full
queue of a deployment becomes 503 with ``Retry-After`` in the ingress, wherever it is raised.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from serve.catalogue import Catalogue
from serve.config import ServeConfig

# Any: Ray's handle types lose what class the deployment is of.
Handle = Any


@dataclass(kw_only=True)
class Service:
    """The parts behind the routes.

    ``models`` is the handle of the deployment that talks, or none where it was left out.
    """

    config: ServeConfig
    catalogue: Catalogue
    strategies: Handle
    pruning: Handle
    models: Handle | None


def service_of(request: Request) -> Service:
    """Return the service of the replica that answers."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDependency = Annotated[Service, Depends(service_of)]
