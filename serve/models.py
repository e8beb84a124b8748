"""The deployment that talks: vLLM engines, switched between variants."""

from __future__ import annotations

from ray.serve import Application

from serve.config import ServeConfig


def bind_models(config: ServeConfig) -> Application | None:
    """Return the bound deployment, or none where the configuration leaves it out."""
    return None
