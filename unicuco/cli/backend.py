"""Where strategies are evaluated: in this process, or on Ray through `cluster`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unicuco.errors import RequestError

if TYPE_CHECKING:
    from unicuco.pipeline import Backend

_PANEL = "Cluster"

AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        help="local: a Ray of its own; auto or ray://HOST:PORT: a running one; none: without Ray.",
        rich_help_panel=_PANEL,
    ),
]
ReplicasOption = Annotated[
    int, typer.Option("--replicas", min=1, help="Copies of the model.", rich_help_panel=_PANEL)
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus",
        min=0.0,
        max=1.0,
        help="Of one, per copy or part; 0: CPUs; left out: what there is, shared.",
        rich_help_panel=_PANEL,
    ),
]


def check_address(
    address: str, *, replicas: int, shards: int = 1, gpus: float | None = None
) -> None:
    """Refuse what `open_backend` can't serve, without importing Ray.

    Raises:
        RequestError: an address of unknown form, or replicas, shards or GPUs asked for without Ray.
    """
    asked = {"--replicas": replicas > 1, "--shards": shards > 1, "--gpus": bool(gpus)}
    for option, is_asked in asked.items():
        if address == "none" and is_asked:
            raise RequestError(f"{option} needs Ray; leave out --address none")
    if address not in ("local", "auto", "none") and not address.startswith("ray://"):
        raise RequestError(
            f"--address must be local, auto, ray://HOST:PORT or none, got {address!r}"
        )


def open_backend(
    address: str, *, replicas: int, shards: int = 1, gpus: float | None = None
) -> Backend:
    """Return the backend that an address names; it starts when it is entered.

    Raises:
        RequestError: see `check_address`.
    """
    check_address(address, replicas=replicas, shards=shards, gpus=gpus)
    if address == "none":
        from unicuco.pipeline import LocalBackend

        return LocalBackend()
    from cluster.driver import RayBackend

    return RayBackend(address=address, replicas=replicas, shards=shards, gpus=gpus)
