"""What every route may use: one `Service` per ingress replica, reached through `ServiceDependency`.

A router reaches a deployment by its handle: ``await service.models.METHOD.remote(…)``. A full queue
or a lost replica becomes 503 with ``Retry-After`` in `serve.api`, wherever it is raised.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.handles import Handle
from serve.metrics import Metrics
from serve.packing import Packing
from serve.planning import Arrivals, Planning
from unicuco.store import JobStore

T = TypeVar("T")


@dataclass(kw_only=True)
class Service:
    """The parts behind the routes.

    ``models`` is the handle of the deployment that talks, or none where it was left out.
    ``is_draining``: the service is being stopped, and what has no end of its own must end.
    """

    config: ServeConfig
    catalogue: Catalogue
    jobs: JobStore
    metrics: Metrics
    arrivals: Arrivals
    planning: Planning
    packing: Packing
    strategies: Handle
    pruning: Handle
    models: Handle | None
    num_streams: int = 0
    is_draining: bool = False

    async def store(self, work: Callable[[JobStore], T]) -> T:
        """Do something with the jobs' database without holding up other requests."""
        return await asyncio.to_thread(work, self.jobs)


async def service_of(request: Request) -> Service:
    """Return the service of the replica that answers."""
    # Not a plain function: FastAPI would take a thread for it, at half the cost of a whole answer.
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDependency = Annotated[Service, Depends(service_of)]
