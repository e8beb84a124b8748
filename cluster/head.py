"""`HeadWatch`: ends a driver with one line when the head of its cluster is gone for good.

Ray does so too, after a minute, with a line that does not say what becomes of the run; till then
its calls wait, so that nothing can be closed either. A head that comes back before, with its state
kept elsewhere (Redis), is joined again by Ray. A driver outside the cluster (``ray://``) reaches
the head's client server and maybe nothing else of it, so that is what is looked at; Ray waits half
a minute for it. What this module does not know: the run.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Final

# Ray's own limits, and how much of them is waited for.
_LIMIT: Final = ("RAY_gcs_rpc_server_reconnect_timeout_s", 60.0)
_CLIENT_LIMIT: Final = ("RAY_CLIENT_RECONNECT_GRACE_PERIOD", 30.0)
_SHARE: Final = 0.6
_LOOK_EVERY_S: Final = 1.0
CLIENT: Final = "ray://"
_REACH_S: Final = 5.0


class HeadWatch:
    """Looks every second, in a thread, whether anything listens at a head's address.

    Args:
        address: ``HOST:PORT`` of the head's control service, or ``ray://HOST:PORT`` of its client
            server: what this process reaches it by.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        name, default_s = _CLIENT_LIMIT if address.startswith(CLIENT) else _LIMIT
        self._limit_s = _SHARE * float(os.environ.get(name, default_s))
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, name="unicuco-head", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()

    def _watch(self) -> None:
        seen_at = time.monotonic()
        while not self._is_over.wait(_LOOK_EVERY_S):
            if self._answers():
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > self._limit_s:
                self._end()

    def _answers(self) -> bool:
        host, _, port = self._address.removeprefix(CLIENT).rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        print(
            f"error: the head of the Ray cluster at {self._address} is gone: what was recorded is"
            " kept; start a cluster and go on with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # any other way leads through calls of Ray's, which wait for the head
