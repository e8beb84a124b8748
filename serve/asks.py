"""What travels between the ingress and the strategies' deployment."""

from __future__ import annotations

from dataclasses import dataclass

from unicuco.errors import UnicucoError
from unicuco.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Requests of one caller for one run."""

    run: str
    requests: tuple[Request, ...]


# A plan document as JSON, written once where it was made, or the error that says why there is none.
Answer = bytes | UnicucoError
