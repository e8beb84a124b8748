"""Where a head is looked for, and for how long one that is gone is waited for."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cluster.head import HeadWatch

_WATCH = """
import sys, time
from cluster.head import HeadWatch
HeadWatch(sys.argv[1])
print("watching", flush=True)
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "limit"),
    [
        ("", "RAY_gcs_rpc_server_reconnect_timeout_s"),
        ("ray://", "RAY_CLIENT_RECONNECT_GRACE_PERIOD"),
    ],
)
def test_a_head_that_is_gone_ends_the_driver_with_one_line(
    prefix: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limit, "2")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"{prefix}127.0.0.1:{head.getsockname()[1]}"
        driver = subprocess.Popen(
            [sys.executable, "-c", _WATCH, address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "watching\n"
        for _ in range(3):
            head.accept()[0].close()  # it is looked at again and again
        assert driver.poll() is None
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert errors.startswith(f"error: the head of the Ray cluster at {address} is gone: ")
    assert errors.count("\n") == 1


def test_a_head_outside_is_given_the_time_that_its_client_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    monkeypatch.delenv("RAY_CLIENT_RECONNECT_GRACE_PERIOD", raising=False)
    watches = [HeadWatch(address) for address in ("127.0.0.1:9", "ray://127.0.0.1:9")]
    for watch in watches:
        watch.stop()
    assert [watch._limit_s for watch in watches] == [36.0, 18.0]
