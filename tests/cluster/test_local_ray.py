"""Joining a cluster: what is tried a second time, without a cluster."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cluster import local_ray
from unicuco.errors import ClusterError

# What Ray's client raises where the server that the head starts for it does not come up.
DEAD_SERVER = ConnectionAbortedError("Initialization failure from server:\nRuntimeError: it died")


@pytest.fixture
def address() -> Iterator[str]:
    """Where something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"ray://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What Ray's next attempts raise; after the last one it joins."""
    raised: list[Exception] = []

    def init(**_: object) -> None:
        if raised:
            raise raised.pop(0)

    monkeypatch.setattr(local_ray.ray, "init", init)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    return raised


def test_a_driver_whose_server_dies_at_birth_joins_at_its_second_try(
    address: str, failures: list[Exception]
) -> None:
    failures.append(DEAD_SERVER)
    local_ray.connect(address=address)
    assert not failures


@pytest.mark.parametrize(
    ("raised", "left"), [([DEAD_SERVER] * 2, 0), ([RuntimeError("other version"), DEAD_SERVER], 1)]
)
def test_what_does_not_pass_is_one_line(
    address: str, failures: list[Exception], raised: list[Exception], left: int
) -> None:
    failures.extend(raised)
    with pytest.raises(ClusterError, match="can't be joined") as error:
        local_ray.connect(address=address)
    assert "\n" not in str(error.value)
    assert len(failures) == left, "tried again only where that may help"
