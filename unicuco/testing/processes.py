"""How tests start Python processes that see the same code."""

from __future__ import annotations

import os
import sys


def child_environment() -> dict[str, str]:
    """Return this process' environment, its import path included."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
