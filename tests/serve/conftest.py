"""One Serve on the session's Ray: the service as it is, and one whose cutters misbehave."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from serve.config import Bounds, EngineOptions, PruningOptions, ServeConfig, StrategyOptions

STREAMS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running service."""

    url: str
    config: ServeConfig
    name: str

    def client(self) -> httpx.Client:
        """Return a client of it."""
        return httpx.Client(base_url=self.url, timeout=60)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Say whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small_config(run: Path, data: Path, port: int, *more: Path, **changes: object) -> ServeConfig:
    """Return a configuration that fits beside everything else on two cores."""
    options: dict[str, object] = {
        "strategies": StrategyOptions(num_cpus=0.01, max_replicas=1, batch_wait_s=0.05),
        "pruning": PruningOptions(num_cpus=0.01, downscale_delay_s=4.0),
        "engines": EngineOptions(max_engines=0),
        "bounds": Bounds(max_requests=100, max_body_bytes=100_000, max_streams=STREAMS),
    }
    return ServeConfig.of_runs([run, *more], data=data, port=port, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def serve_port(ray_local: None) -> Iterator[int]:
    """The port of Serve's one proxy."""
    from ray import serve as ray_serve

    port = free_port()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    ray_serve.shutdown()


@pytest.fixture(scope="session")
def server(
    serve_port: int, tiny_run: Path, tiny_bits_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The service as it is, of two runs, for tests that leave it as they found it."""
    from serve.running import running

    data = tmp_path_factory.mktemp("serve") / "data"
    config = small_config(tiny_run, data, serve_port, tiny_bits_run)
    with running(config) as url:
        yield Server(url=url, config=config, name="unicuco")


@pytest.fixture(scope="session")
def chaos(
    serve_port: int, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A service whose cutters are slow or kill their replica."""
    from serve.running import running
    from tests.serve.cutters import ChaosCutter

    config = small_config(tiny_run, tmp_path_factory.mktemp("chaos") / "data", serve_port)
    with running(config, build_cutter=ChaosCutter, name="chaos", route_prefix="/chaos") as url:
        yield Server(url=url, config=config, name="chaos")


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A client of the service."""
    with server.client() as client:
        yield client
