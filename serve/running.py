"""Starting the service on a Ray that is there, and ending it so that nothing accepted is dropped.

What it does not know: where Ray comes from.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Final

from ray import serve as ray_serve

from serve.app import build_app
from serve.config import ServeConfig
from serve.worker import CutterFactory
from unicuco.errors import ClusterError
from unicuco.store.database import display_name

APP_NAME: Final = "unicuco"
_DRAIN_S: Final = 30.0
_LOG: Final = logging.getLogger("ray.serve")


@contextmanager
def running(
    config: ServeConfig,
    *,
    build_cutter: CutterFactory | None = None,
    name: str = APP_NAME,
    route_prefix: str = "/",
) -> Iterator[str]:
    """Run the application inside the block and yield its URL; drain it afterwards.

    Requests that were accepted are answered, and jobs at hand finished; queued ones stay queued.

    Args:
        config: of the service; host and port count for the first application of a Ray only.
        build_cutter: see `build_app`.
        name: of the application.
        route_prefix: where it answers.

    Raises:
        ClusterError: it can't be started.
    """
    _start(config, build_cutter, name, route_prefix)
    try:
        yield f"http://{config.host}:{config.port}{route_prefix.rstrip('/')}"
    finally:
        _drain(name)
        ray_serve.delete(name)


def _start(
    config: ServeConfig, build_cutter: CutterFactory | None, name: str, route_prefix: str
) -> None:
    options = asdict(config) | {
        "key_digests": f"{len(config.key_digests)} keys",
        "store": display_name(config.jobs_location),
    }
    _LOG.info("options %s", options)
    try:
        ray_serve.start(
            http_options={"host": config.host, "port": config.port},
            proxy_location="HeadOnly",  # one address is told, so one is listened on
        )
        app = build_app(config, build_cutter=build_cutter)
        ray_serve.run(app, name=name, route_prefix=route_prefix)
    except Exception as error:  # Serve raises plain ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ClusterError(f"the service can't be started: {reason}") from error


def _drain(name: str) -> bool:
    """Let what is at hand be finished while the ingress tells new callers to come back later.

    Serve itself would tell them that there is no such path.

    Returns:
        Whether nothing is at hand any more.
    """
    deadline = time.monotonic() + _DRAIN_S
    try:
        for part in ("ingress", "pruning"):
            call = ray_serve.get_deployment_handle(part, app_name=name).broadcast("drain")
            call.results(timeout_s=max(0.0, deadline - time.monotonic()), return_exceptions=True)
    except Exception as error:  # Serve's own, or out of time
        _LOG.warning("not everything is finished yet: %r", error)
        return False
    return True


def run_app(
    config: ServeConfig,
    *,
    on_ready: Callable[[str], None],
    build_cutter: CutterFactory | None = None,
) -> None:
    """Run the service until this process is told to stop, then drain it.

    Args:
        config: of the service.
        on_ready: told the URL when the service answers.
        build_cutter: see `build_app`.

    Raises:
        ClusterError: it can't be started.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _start(config, build_cutter, APP_NAME, "/")
        try:
            for number in before:
                signal.signal(number, on_signal)
            on_ready(f"http://{config.host}:{config.port}")
            stop.wait()
        finally:
            _end()
    finally:
        if not _others():
            ray_serve.shutdown()  # type: ignore[no-untyped-call]  # Serve's
        for number, handler in before.items():
            signal.signal(number, handler)


def _end() -> None:
    """End the application, or leave that to the end of Serve.

    Serve's end takes the proxy first, so that nobody is told anything wrong; but answers that are
    still under way need it, and so do the applications of others.
    """
    if not _drain(APP_NAME) or _others():
        ray_serve.delete(APP_NAME)


def _others() -> set[str]:
    """Return the names of the other applications of this Ray."""
    return set(ray_serve.status().applications) - {APP_NAME}
