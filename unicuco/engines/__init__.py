"""Engines that produce text from a model folder, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from unicuco.engines.protocol import Generation, Sampling, TextEngine
from unicuco.engines.vllm_engine import VllmEngine, VllmOptions

ENGINES: Final[Mapping[str, Callable[[], TextEngine]]] = {
    "vllm": VllmEngine,
}

__all__ = ["ENGINES", "Generation", "Sampling", "TextEngine", "VllmEngine", "VllmOptions"]
