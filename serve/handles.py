"""The type of a deployment's handle."""

from __future__ import annotations

from typing import Any

# Any: Ray's own handle types lose what class the deployment is of.
Handle = Any
